"""Patch GLM, GLM-4 and GLM-4-MoE (GLM-4.5): rotary positions on a part of each head, few KV heads."""

from hf_sparse.patches.base import Family, register_family

GLM = register_family(Family(model_types=("glm",), attention="transformers.models.glm.modeling_glm:GlmAttention"))
GLM4 = register_family(Family(model_types=("glm4",), attention="transformers.models.glm4.modeling_glm4:Glm4Attention"))
GLM4_MOE = register_family(
    Family(model_types=("glm4_moe",), attention="transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeAttention")
)
