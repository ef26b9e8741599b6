"""Patch Qwen3-MoE: Qwen3 with experts in place of the MLP; a sliding window, if any, is in every layer."""

from hf_sparse.patches.base import Family, register_family

QWEN3_MOE = register_family(
    Family(model_types=("qwen3_moe",), attention="transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeAttention")
)
