"""Patch ModernBERT: an encoder with rotary positions and fused projections; its local layers stay as they are."""

from hf_sparse.patches.base import Family, register_family

MODERNBERT = register_family(
    Family(
        model_types=("modernbert",),
        attention="transformers.models.modernbert.modeling_modernbert:ModernBertAttention",
        hidden_size=lambda module: module.Wqkv.in_features,
        num_key_value_heads=lambda module: module.config.num_attention_heads,
    )
)
