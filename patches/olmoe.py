"""Patch OLMoE: experts in place of the MLP, queries and keys normalised over all heads."""

from hf_sparse.patches.base import Family, register_family

OLMOE = register_family(
    Family(
        model_types=("olmoe",),
        attention="transformers.models.olmoe.modeling_olmoe:OlmoeAttention",
        hidden_size=lambda module: module.q_proj.in_features,
        num_key_value_heads=lambda module: module.config.num_key_value_heads,
    )
)
