"""Attend with entmax over a graph that is predicted from small projections of queries and keys: Sparsefinder."""

from typing import TYPE_CHECKING

from hf_sparse.late_imports import late_imports

__all__ = [
    "SparsefinderAttention",
    "SparsefinderCacheLayer",
    "SparsefinderConfig",
    "SparsefinderModel",
    "fit_predictors",
]

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.method import (
        SparsefinderAttention,
        SparsefinderCacheLayer,
        SparsefinderConfig,
        SparsefinderModel,
        fit_predictors,
    )
else:
    __getattr__ = late_imports(__name__, f"{__name__}.method", __all__)
