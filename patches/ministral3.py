"""Patch the text model of Ministral 3: queries grow with the logarithm of their position, before attention."""

from hf_sparse.patches.base import Family, register_family

MINISTRAL3 = register_family(
    Family(
        model_types=("ministral3",),
        attention="transformers.models.ministral3.modeling_ministral3:Ministral3Attention",
        hidden_size=lambda module: module.q_proj.in_features,
        num_key_value_heads=lambda module: module.config.num_key_value_heads,
        is_local=lambda module: module.config.sliding_window is not None,
    )
)
