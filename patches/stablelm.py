"""Patch StableLM: rotary positions on a part of each head, in some checkpoints normalised queries and keys."""

from hf_sparse.patches.base import Family, register_family

STABLELM = register_family(
    Family(model_types=("stablelm",), attention="transformers.models.stablelm.modeling_stablelm:StableLmAttention")
)
