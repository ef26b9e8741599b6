"""Patch Qwen3: normalised queries and keys; with `use_sliding_window`, the upper layers are local."""

from hf_sparse.patches.base import Family, register_family

QWEN3 = register_family(
    Family(model_types=("qwen3",), attention="transformers.models.qwen3.modeling_qwen3:Qwen3Attention")
)
