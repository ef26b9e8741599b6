"""Patch EuroBERT: an encoder with the layers of Llama, rotary positions and grouped heads."""

from hf_sparse.patches.base import Family, register_family

EUROBERT = register_family(
    Family(
        model_types=("eurobert",),
        attention="transformers.models.eurobert.modeling_eurobert:EuroBertAttention",
        hidden_size=lambda module: module.q_proj.in_features,
        num_key_value_heads=lambda module: module.config.num_key_value_heads,
    )
)
