"""Mistral: Llama with a sliding window in some checkpoints, which then holds in every layer."""

from torch import nn

from hf_sparse.patches.base import Family, register_family


def _attention() -> type[nn.Module]:
    from transformers.models.mistral.modeling_mistral import MistralAttention

    return MistralAttention


MISTRAL = register_family(
    Family(
        model_types=("mistral",),
        attention=_attention,
        hidden_size=lambda module: module.q_proj.in_features,
        num_key_value_heads=lambda module: module.config.num_key_value_heads,
        is_local=lambda module: module.config.sliding_window is not None,
    )
)
