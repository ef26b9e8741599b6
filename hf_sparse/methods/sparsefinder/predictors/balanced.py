"""Predict by clusters of equal size, for encoders: which points a centroid takes depends on the whole text."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor, Span
from hf_sparse.ops.predictors.buckets import bucket_edges, key_counts, matching_pairs, query_counts
from hf_sparse.ops.predictors.clustering import assign_balanced, balanced_width
from hf_sparse.ops.predictors.kmeans import kmeans

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class BalancedClustering(ProjectedPredictor):
    """Let each centroid take its nearest queries and keys, an equal number each; codes are points."""

    needs_whole_text = True

    @property
    def points_needed(self) -> int:
        return self.config.clusters

    def buffers(self, kv_heads: int) -> dict[str, tuple[int, ...]]:
        return {"centroids": (kv_heads, self.config.clusters, self.config.rank)}

    def fit(self, learned: "SparsefinderParameters", points: Tensor, generator: torch.Generator | None) -> None:
        learned.centroids.copy_(kmeans(points, self.config.clusters, generator=generator))

    def edges(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        return bucket_edges(*self._clusters(learned, of_queries, of_keys, span), self.config.clusters)

    def log_scores(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        (size, rows), clusters = self.tiles, self.config.clusters
        query, key = self._clusters(learned, of_queries, of_keys, span)
        counts = query_counts(query, clusters, keys=span.keys, size=rows), key_counts(key, clusters, size=size)
        return (matching_pairs(*counts) + 1).log()  # where nothing matches, the profile decides

    def _clusters(
        self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span
    ) -> tuple[Tensor, Tensor]:
        tokens = span.keys if span.valid is None else span.valid.sum(-1)
        width = balanced_width(tokens, self.config.clusters, self.config.top_clusters)
        centroids = learned.centroids.float()
        query, key = (assign_balanced(points, centroids, width, span.valid) for points in (of_queries, of_keys))
        return query, key
