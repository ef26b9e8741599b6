"""Compute SparseK attention: `api` checks and dispatches, `reference` defines, `tiled` and `triton` run.

`causal` and `bidirectional` find the keys that a tile of queries reaches.
"""

from hf_sparse.ops.selection.api import sparsek_attention as sparsek_attention
