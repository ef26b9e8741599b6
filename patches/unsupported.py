"""Say why the attention of some well-known families cannot become sparse, for the error that refuses them."""

_ALIBI = "ALiBi adds a bias by distance to every logit, which sparse attention does not have"
_RELATIVE = "its logits depend on relative positions beyond queries and keys, which sparse attention does not have"
_NO_INTERFACE = "transformers computes its attention without the AttentionInterface"
_ENCODER_DECODER = "an encoder and a decoder with cross-attention, and every patch is for one or the other"

REASONS = {
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "falcon": f"{_NO_INTERFACE}, with ALiBi in some checkpoints",
    "gpt_oss": "every softmax has a learned sink without a value, which sparse attention does not have",
    "deberta": _RELATIVE,
    "deberta-v2": _RELATIVE,
    "gpt_neo": _NO_INTERFACE,
    "t5": _RELATIVE,
    "mt5": _RELATIVE,
    "bart": _ENCODER_DECODER,
    "whisper": _ENCODER_DECODER,
    "gemma3": "the tokens of an image attend to each other in both directions; its text model is gemma3_text",
    "deepseek_v3": "its keys and values are compressed in a latent vector (MLA), sparse attention takes them per head",
    "qwen3_next": "most of its layers are linear attention, which keeps no keys to choose from",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
}
