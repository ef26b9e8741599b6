"""Patch GLM, GLM-4 and GLM-4-MoE (GLM-4.5): rotary positions on a part of each head, few KV heads."""

from hf_sparse.patches.base import Family, register_family


def _family(model_type: str, attention: str) -> Family:
    return register_family(
        Family(
            model_types=(model_type,),
            attention=attention,
            hidden_size=lambda module: module.q_proj.in_features,
            num_key_value_heads=lambda module: module.config.num_key_value_heads,
        )
    )


GLM = _family("glm", "transformers.models.glm.modeling_glm:GlmAttention")
GLM4 = _family("glm4", "transformers.models.glm4.modeling_glm4:Glm4Attention")
GLM4_MOE = _family("glm4_moe", "transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeAttention")
