"""Patch ERNIE 4.5, the dense ones: rotary positions turn pairs of neighbouring channels, few KV heads."""

from hf_sparse.patches.base import Family, register_family

ERNIE4_5 = register_family(
    Family(model_types=("ernie4_5",), attention="transformers.models.ernie4_5.modeling_ernie4_5:Ernie4_5Attention")
)
