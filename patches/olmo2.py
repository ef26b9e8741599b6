"""Patch OLMo 2: queries and keys are normalised over all heads, before rotary positions."""

from hf_sparse.patches.base import Family, register_family

OLMO2 = register_family(
    Family(model_types=("olmo2",), attention="transformers.models.olmo2.modeling_olmo2:Olmo2Attention")
)
