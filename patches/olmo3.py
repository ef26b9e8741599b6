"""Patch OLMo 3: OLMo 2 with a sliding window in three of four layers, which stay as they are."""

from hf_sparse.patches.base import Family, register_family

OLMO3 = register_family(
    Family(model_types=("olmo3",), attention="transformers.models.olmo3.modeling_olmo3:Olmo3Attention")
)
