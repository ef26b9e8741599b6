"""Compute SparseK attention: `api` checks and dispatches, `reference` defines, `tiled` and `triton` run.

What the tiles reach is told by `causal` and `bidirectional`.
"""

from hf_sparse.ops.selection.api import sparsek_attention as sparsek_attention
