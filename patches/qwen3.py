"""Qwen3: normalised queries and keys; with `use_sliding_window`, the upper layers are local."""

from torch import nn

from hf_sparse.patches.base import Family, register_family


def _attention() -> type[nn.Module]:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    return Qwen3Attention


QWEN3 = register_family(
    Family(
        model_types=("qwen3",),
        attention=_attention,
        hidden_size=lambda module: module.q_proj.in_features,
        num_key_value_heads=lambda module: module.config.num_key_value_heads,
    )
)
