"""Patch Llama: rotary positions, grouped-query attention; SmolLM, TinyLlama and others have its model type too."""

from hf_sparse.patches.base import Family, register_family

LLAMA = register_family(
    Family(model_types=("llama",), attention="transformers.models.llama.modeling_llama:LlamaAttention")
)
