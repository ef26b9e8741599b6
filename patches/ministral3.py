"""Patch the text model of Ministral 3: queries grow with the logarithm of their position, before attention."""

from hf_sparse.patches.base import Family, register_family

MINISTRAL3 = register_family(
    Family(
        model_types=("ministral3",),
        attention="transformers.models.ministral3.modeling_ministral3:Ministral3Attention",
        is_local=lambda module: module.config.sliding_window is not None,
    )
)
