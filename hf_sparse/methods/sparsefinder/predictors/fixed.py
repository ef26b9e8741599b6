"""Predict by bins of equally many tokens, for encoders: the rank of a token depends on the whole text."""

from typing import TYPE_CHECKING

from torch import Tensor

from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor, Span
from hf_sparse.ops.predictors.buckets import bucket_edges
from hf_sparse.ops.predictors.quantization import fixed_bin_pairs, fixed_bins

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class FixedBins(ProjectedPredictor):
    """Put `bin_width` queries and as many keys into each bin of each dimension, by rank; codes are points."""

    needs_whole_text = True

    def edges(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        width = self.config.bin_width
        key, buckets = fixed_bins(of_keys, width, span.valid)
        return bucket_edges(fixed_bins(of_queries, width, span.valid)[0], key, buckets)

    def log_scores(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        size, rows = self.tiles
        pairs = fixed_bin_pairs(of_queries, of_keys, self.config.bin_width, size, rows, span.valid)
        return (pairs + 1).log()  # where nothing matches, the profile decides
