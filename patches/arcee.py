"""Patch Arcee (AFM): Llama whose MLP has a squared ReLU and no gate."""

from hf_sparse.patches.base import Family, register_family

ARCEE = register_family(
    Family(model_types=("arcee",), attention="transformers.models.arcee.modeling_arcee:ArceeAttention")
)
