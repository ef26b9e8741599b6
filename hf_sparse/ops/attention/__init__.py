"""SparseK attention: `api` checks and dispatches, `dense` is the reference, `tiled` is what runs."""

from hf_sparse.ops.attention.api import sparsek_attention as sparsek_attention
