"""SparseK attention: `api` checks and dispatches, `dense` is the reference, `tiled` runs.

What the tiles reach is told by `causal` and `bidirectional`.
"""

from hf_sparse.ops.attention.api import sparsek_attention as sparsek_attention
