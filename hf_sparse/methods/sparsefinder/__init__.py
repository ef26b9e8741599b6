"""Sparsefinder: entmax attention over a graph that is predicted from small projections of queries and keys."""

from hf_sparse.methods.registry import Method, register_method
from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention as SparsefinderAttention
from hf_sparse.methods.sparsefinder.cache import SparsefinderCacheLayer as SparsefinderCacheLayer
from hf_sparse.methods.sparsefinder.config import PEFT_TYPE
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig as SparsefinderConfig
from hf_sparse.methods.sparsefinder.fit import fit_predictors as fit_predictors

register_method(Method(PEFT_TYPE, SparsefinderConfig, SparsefinderAttention, prefix="sparsefinder_"))
