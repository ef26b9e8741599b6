"""Patch Mistral: Llama with a sliding window in some checkpoints, which then holds in every layer."""

from hf_sparse.patches.base import Family, register_family

MISTRAL = register_family(
    Family(
        model_types=("mistral",),
        attention="transformers.models.mistral.modeling_mistral:MistralAttention",
        is_local=lambda module: module.config.sliding_window is not None,
    )
)
