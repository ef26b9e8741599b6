"""Patch GPT-NeoX and Pythia: one projection for queries, keys and values, rotary positions on a part of each head."""

from hf_sparse.patches.base import Family, register_family

GPT_NEOX = register_family(
    Family(
        model_types=("gpt_neox",),
        attention="transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXAttention",
        hidden_size=lambda module: module.query_key_value.in_features,
        num_key_value_heads=lambda module: module.config.num_attention_heads,
    )
)
