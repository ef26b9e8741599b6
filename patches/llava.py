"""Patch LLaVA: the Llama that reads the text, for which the patches of an image are keys like any other.

The vision tower stays as it is: the attention modules of a family are found by their class.
"""

from typing import Any

from hf_sparse.patches.base import Family, register_family


def _refusal(model: Any) -> str | None:
    text = model.config.get_text_config().model_type
    return None if text == "llama" else f"its text model is of type {text!r}, and its patch is for 'llama'"


LLAVA = register_family(
    Family(
        model_types=("llava",),
        attention="transformers.models.llama.modeling_llama:LlamaAttention",
        refusal=_refusal,
    )
)
