"""Patch GPT-J: rotary positions on a part of each head, attention and MLP side by side.

Older versions of transformers compute GPT-J's attention within the module, where no method gets hold of it.
"""

from typing import Any

from hf_sparse.patches.base import Family, register_family


def _refusal(model: Any) -> str | None:
    if model._supports_attention_backend:
        return None
    from transformers import __version__

    return f"GPT-J of transformers {__version__} computes attention without the AttentionInterface; use a newer one"


GPTJ = register_family(
    Family(
        model_types=("gptj",),
        attention="transformers.models.gptj.modeling_gptj:GPTJAttention",
        hidden_size=lambda module: module.embed_dim,
        num_key_value_heads=lambda module: module.num_attention_heads,
        refusal=_refusal,
    )
)
