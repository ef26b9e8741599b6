"""Patch GraniteMoE: Granite with experts in place of the MLP."""

from hf_sparse.patches.base import Family, register_family

GRANITEMOE = register_family(
    Family(
        model_types=("granitemoe",), attention="transformers.models.granitemoe.modeling_granitemoe:GraniteMoeAttention"
    )
)
