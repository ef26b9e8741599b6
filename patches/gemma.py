"""Patch Gemma, Gemma 2 and the text models of Gemma 3, whose local layers stay as they are.

Gemma 2 caps its attention logits (`attn_logit_softcapping`), in all published checkpoints; sparse attention does not.
"""

from typing import Any

from hf_sparse.patches.base import Family, register_family


def _refusal(model: Any) -> str | None:
    if getattr(model.config, "use_bidirectional_attention", False):
        return "its attention is bidirectional (use_bidirectional_attention), and its patch is for decoders"
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    if softcap is not None:
        return f"its attention logits are soft-capped (attn_logit_softcapping={softcap}), sparse attention has no cap"
    return None


def _family(model_type: str, attention: str) -> Family:
    return register_family(
        Family(
            model_types=(model_type,),
            attention=attention,
            refusal=_refusal,
        )
    )


GEMMA = _family("gemma", "transformers.models.gemma.modeling_gemma:GemmaAttention")
GEMMA2 = _family("gemma2", "transformers.models.gemma2.modeling_gemma2:Gemma2Attention")
GEMMA3_TEXT = _family("gemma3_text", "transformers.models.gemma3.modeling_gemma3:Gemma3Attention")
