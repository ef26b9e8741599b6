"""Gemma, Gemma 2 and the text models of Gemma 3, whose local layers stay as they are.

Gemma 2 caps its attention logits (`attn_logit_softcapping`), in all published checkpoints; sparse attention does not.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_sparse.patches.base import Family, register_family


def _gemma() -> type[nn.Module]:
    from transformers.models.gemma.modeling_gemma import GemmaAttention

    return GemmaAttention


def _gemma2() -> type[nn.Module]:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    return Gemma2Attention


def _gemma3() -> type[nn.Module]:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

    return Gemma3Attention


def _refusal(model: Any) -> str | None:
    if getattr(model.config, "use_bidirectional_attention", False):
        return "its attention is bidirectional (use_bidirectional_attention), and its patch is for decoders"
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    if softcap is not None:
        return f"its attention logits are soft-capped (attn_logit_softcapping={softcap}), sparse attention has no cap"
    return None


def _family(model_type: str, attention: Callable[[], type[nn.Module]]) -> Family:
    return register_family(
        Family(
            model_types=(model_type,),
            attention=attention,
            hidden_size=lambda module: module.q_proj.in_features,
            num_key_value_heads=lambda module: module.config.num_key_value_heads,
            refusal=_refusal,
        )
    )


GEMMA = _family("gemma", _gemma)
GEMMA2 = _family("gemma2", _gemma2)
GEMMA3_TEXT = _family("gemma3_text", _gemma3)
