"""Patch OLMoE: experts in place of the MLP, queries and keys normalised over all heads."""

from hf_sparse.patches.base import Family, register_family

OLMOE = register_family(
    Family(model_types=("olmoe",), attention="transformers.models.olmoe.modeling_olmoe:OlmoeAttention")
)
