"""Keep the k best older keys, by a learned scorer, beside a sliding window and sinks: SparseK."""

from typing import TYPE_CHECKING

from hf_sparse.late_imports import late_imports

__all__ = ["Budget", "SparseKAttention", "SparseKCacheLayer", "SparseKConfig", "SparseKModel"]

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.method import (
        Budget,
        SparseKAttention,
        SparseKCacheLayer,
        SparseKConfig,
        SparseKModel,
    )
else:
    __getattr__ = late_imports(__name__, f"{__name__}.method", __all__)
