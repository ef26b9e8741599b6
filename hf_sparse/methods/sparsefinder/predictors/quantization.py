"""Predict by bins between fitted boundaries: tokens that share one in some dimension match."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor, Span
from hf_sparse.ops.predictors.buckets import bucket_edges, described_counts, key_counts, matching_pairs
from hf_sparse.ops.predictors.quantization import fit_boundaries, shared_bins

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class Quantization(ProjectedPredictor):
    """Code queries and keys by their bins, whose boundaries are the same for both."""

    @property
    def points_needed(self) -> int:
        return self.config.bins

    def buffers(self, kv_heads: int) -> dict[str, tuple[int, ...]]:
        return {"boundaries": (kv_heads, self.config.rank, self.config.bins - 1)}

    def fit(self, learned: "SparsefinderParameters", points: Tensor, generator: torch.Generator | None) -> None:
        learned.boundaries.copy_(fit_boundaries(points, self.config.bins))

    def query_codes(self, learned: "SparsefinderParameters", query: Tensor) -> Tensor:
        return shared_bins(learned.project_queries(query), learned.boundaries.float())

    def key_codes(self, learned: "SparsefinderParameters", key: Tensor) -> Tensor:
        return shared_bins(learned.project_keys(key), learned.boundaries.float())

    def edges(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        return bucket_edges(of_queries, of_keys, self._buckets)

    def log_scores(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        size, rows = self.tiles
        counts = described_counts(*self.described(of_queries, span), self._buckets, rows)
        pairs = matching_pairs(counts, key_counts(of_keys, self._buckets, size=size))
        return (pairs + 1).log()  # where nothing matches, the profile decides

    @property
    def _buckets(self) -> int:
        return self.config.rank * self.config.bins
