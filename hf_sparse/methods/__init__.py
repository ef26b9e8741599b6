"""Sparse attention methods: what a method learns, computes and caches, apart from any model family.

A method is one subpackage, which registers itself; importing this package imports them all.
"""

from hf_sparse.methods import sparsefinder as sparsefinder
from hf_sparse.methods import sparsek as sparsek
from hf_sparse.methods.registry import method_of as method_of
from hf_sparse.methods.registry import registered_methods as registered_methods
