"""Patch Phi-3 and Phi-4: one projection for queries, keys and values; a sliding window, if any, is in every layer."""

from hf_sparse.patches.base import Family, register_family

PHI3 = register_family(
    Family(
        model_types=("phi3",),
        attention="transformers.models.phi3.modeling_phi3:Phi3Attention",
        hidden_size=lambda module: module.qkv_proj.in_features,
        num_key_value_heads=lambda module: module.num_key_value_heads,
        is_local=lambda module: module.config.sliding_window is not None,
    )
)
