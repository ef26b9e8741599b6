"""Patch Qwen2-MoE: Qwen2 with experts in place of the MLP; with `use_sliding_window`, some layers are local."""

from hf_sparse.patches.base import Family, register_family

QWEN2_MOE = register_family(
    Family(model_types=("qwen2_moe",), attention="transformers.models.qwen2_moe.modeling_qwen2_moe:Qwen2MoeAttention")
)
