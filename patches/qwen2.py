"""Patch Qwen2 and Qwen2.5: biased projections; with `use_sliding_window`, the upper layers are local."""

from hf_sparse.patches.base import Family, register_family

QWEN2 = register_family(
    Family(model_types=("qwen2",), attention="transformers.models.qwen2.modeling_qwen2:Qwen2Attention")
)
