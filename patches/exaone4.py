"""Patch EXAONE 4: layers with a sliding window stay as they are, the others have no positions beside those."""

from hf_sparse.patches.base import Family, register_family

EXAONE4 = register_family(
    Family(
        model_types=("exaone4",),
        attention="transformers.models.exaone4.modeling_exaone4:Exaone4Attention",
        num_key_value_heads=lambda module: module.num_key_value_heads,
        is_local=lambda module: module.is_sliding,  # `sliding_window` is set in every layer
    )
)
