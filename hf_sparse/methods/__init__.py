"""Sparse attention methods, each in one folder, which registers itself; importing this package registers them all."""

from hf_sparse.core.registry import method_of as method_of
from hf_sparse.core.registry import registered_methods as registered_methods
from hf_sparse.methods import sparsefinder as sparsefinder
from hf_sparse.methods import sparsek as sparsek
