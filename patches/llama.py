"""Llama: rotary positions, grouped-query attention. Also SmolLM, TinyLlama and others whose model type is `llama`."""

from hf_sparse.patches.base import Family, register_family

LLAMA = register_family(
    Family(
        model_types=("llama",),
        attention="transformers.models.llama.modeling_llama:LlamaAttention",
        hidden_size=lambda module: module.q_proj.in_features,
        num_key_value_heads=lambda module: module.config.num_key_value_heads,
    )
)
