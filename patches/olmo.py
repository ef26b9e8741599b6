"""Patch OLMo: Llama with norms without weights; `clip_qkv` bounds queries, keys and values before attention."""

from hf_sparse.patches.base import Family, register_family

OLMO = register_family(Family(model_types=("olmo",), attention="transformers.models.olmo.modeling_olmo:OlmoAttention"))
