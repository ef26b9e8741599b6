"""Patch Mixtral: Mistral with experts in place of the MLP; a sliding window, if any, is in every layer."""

from hf_sparse.patches.base import Family, register_family

MIXTRAL = register_family(
    Family(
        model_types=("mixtral",),
        attention="transformers.models.mixtral.modeling_mixtral:MixtralAttention",
        is_local=lambda module: module.config.sliding_window is not None,
    )
)
