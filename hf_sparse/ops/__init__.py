"""Compute on tensors alone: no model, no configuration, no file. Shapes are `[B, H, T, D]` throughout."""

from hf_sparse.ops.selection import sparsek_attention as sparsek_attention
from hf_sparse.ops.selection.projection import sparsek as sparsek
from hf_sparse.ops.selection.stream import SparseKStream as SparseKStream
from hf_sparse.ops.selection.thresholds import sparsek_thresholds as sparsek_thresholds
from hf_sparse.ops.selection.thresholds import topk_thresholds as topk_thresholds
