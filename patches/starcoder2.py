"""Patch StarCoder2: biased projections; a sliding window, if any, is in every layer."""

from hf_sparse.patches.base import Family, register_family

STARCODER2 = register_family(
    Family(
        model_types=("starcoder2",),
        attention="transformers.models.starcoder2.modeling_starcoder2:Starcoder2Attention",
        is_local=lambda module: module.config.sliding_window is not None,
    )
)
