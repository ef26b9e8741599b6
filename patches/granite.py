"""Patch Granite: logits are scaled by `attention_multiplier`, which the attention function gets as `scaling`."""

from hf_sparse.patches.base import Family, register_family

GRANITE = register_family(
    Family(model_types=("granite",), attention="transformers.models.granite.modeling_granite:GraniteAttention")
)
