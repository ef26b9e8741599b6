"""Patch Llama: rotary positions, grouped-query attention; SmolLM, TinyLlama and others have its model type too."""

from hf_sparse.patches.base import Family, register_family

LLAMA = register_family(
    Family(
        model_types=("llama",),
        attention="transformers.models.llama.modeling_llama:LlamaAttention",
        hidden_size=lambda module: module.q_proj.in_features,
        num_key_value_heads=lambda module: module.config.num_key_value_heads,
    )
)
