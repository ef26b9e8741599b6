"""Mathematics on tensors: no model, no configuration, no file. Shapes are `[B, H, T, D]` throughout."""

from hf_sparse.ops.attention import sparsek_attention as sparsek_attention
from hf_sparse.ops.prefix import sparsek_thresholds as sparsek_thresholds
from hf_sparse.ops.prefix import topk_thresholds as topk_thresholds
from hf_sparse.ops.projection import sparsek as sparsek
from hf_sparse.ops.streaming import SparseKStream as SparseKStream
