"""Patch Cohere (Command R): no biases, attention beside the MLP; the local layers of Cohere 2 stay as they are.

Rotary positions turn pairs of neighbouring channels, and in Cohere 2 the full layers have no positions at all; both
happens before the attention function.
"""

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


COHERE = _family("cohere", "transformers.models.cohere.modeling_cohere:CohereAttention")
COHERE2 = _family("cohere2", "transformers.models.cohere2.modeling_cohere2:Cohere2Attention")
