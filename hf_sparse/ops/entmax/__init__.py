"""Attend by entmax to all keys, given edges or listed tiles, and prove that a list of tiles is complete.

`transform` is the distribution itself, `threshold` finds where it is cut off, `blocks` and `attention` run it on tiles,
`bound` and `predict` tell from the extremes of the keys of a tile what cannot be attended to, `pooled` tells from mean
keys what is attended to most.
"""

from hf_sparse.ops.entmax.api import Certificate as Certificate
from hf_sparse.ops.entmax.api import CertifiedAttention as CertifiedAttention
from hf_sparse.ops.entmax.api import certified_entmax_attention as certified_entmax_attention
from hf_sparse.ops.entmax.api import entmax_attention as entmax_attention
from hf_sparse.ops.entmax.bound import complete_tiles as complete_tiles
from hf_sparse.ops.entmax.pooled import pooled_tiles as pooled_tiles
from hf_sparse.ops.entmax.predict import bound_scores as bound_scores
from hf_sparse.ops.entmax.predict import bound_tiles as bound_tiles
from hf_sparse.ops.entmax.support import support as support
from hf_sparse.ops.entmax.transform import entmax as entmax
from hf_sparse.ops.entmax.weights import entmax_weights as entmax_weights
