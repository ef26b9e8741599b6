"""Predict by clusters: tokens that share one match, and a tile is scored by the clusters of its keys."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor, Span
from hf_sparse.ops.predictors.buckets import bucket_edges, key_counts
from hf_sparse.ops.predictors.cluster_lists import cluster_lists, takes_kernel
from hf_sparse.ops.predictors.clustering import assign, assign_parts, cut_into_parts, points_of_parts
from hf_sparse.ops.predictors.distance import squared_distances, tile_log_mass
from hf_sparse.ops.predictors.kmeans import kmeans
from hf_sparse.ops.predictors.projections import by_group, tile_means

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class Clustering(ProjectedPredictor):
    """Code keys by their nearest centroids. Between tiles the code of a query is its point, otherwise clusters too."""

    @property
    def points_needed(self) -> int:
        return self.config.clusters

    @property
    def fits_keys_only(self) -> bool:
        return self.config.tile is not None

    @property
    def scores_single_keys(self) -> bool:
        return self.config.cluster_parts > 1

    def buffers(self, kv_heads: int) -> dict[str, tuple[int, ...]]:
        return {"centroids": (kv_heads, self.config.clusters, self.config.rank)}

    def fit(self, learned: "SparsefinderParameters", points: Tensor, generator: torch.Generator | None) -> None:
        centroids = kmeans(cut_into_parts(points, self.config.cluster_parts), self.config.clusters, generator=generator)
        learned.centroids.copy_(centroids.unflatten(0, (len(points), -1)).transpose(1, 2).flatten(2))

    def query_codes(self, learned: "SparsefinderParameters", query: Tensor) -> Tensor:
        points = learned.project_queries(query)
        return points if self.config.tile is not None else self._clusters(learned, points)

    def key_codes(self, learned: "SparsefinderParameters", key: Tensor) -> Tensor:
        points = learned.project_keys(key)
        if self.config.tile is None:
            return self._clusters(learned, points)
        return assign_parts(points, learned.centroids.float(), self.config.cluster_parts)

    def edges(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        return bucket_edges(of_queries, of_keys, self.config.clusters)

    def log_scores(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        size, rows = self.tiles
        mean = tile_means(*self.described(of_queries, span), rows)
        centroids = learned.centroids.float()
        if self.scores_single_keys:
            return tile_log_mass(mean, points_of_parts(of_keys, centroids), size, span.valid)
        distance = squared_distances(mean, centroids[None].expand(len(mean), -1, -1, -1))
        weight = (distance.amin(-1, keepdim=True) - distance).double().exp()
        count = key_counts(of_keys, self.config.clusters, size=size).double()
        mass = by_group(weight, count.shape[1]) @ count[:, :, None].transpose(-1, -2)
        return mass.flatten(1, 2).clamp(min=1e-30).log().float()

    def step_lists(
        self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, position: Tensor
    ) -> Tensor:
        if self.scores_single_keys or self.config.head_budgets or not takes_kernel(of_keys, learned.centroids):
            return super().step_lists(learned, of_queries, of_keys, position)
        config, (size, rows) = self.config, self.tiles
        if rows == 1:
            points = of_queries[torch.arange(len(position), device=position.device), :, position]
        else:
            points = tile_means(*self.described(of_queries, Span(1, of_keys.shape[2], True, position)), rows)[:, :, 0]
        profile = learned.profile if config.profile else None
        tensors = (points, of_keys, learned.centroids, profile, position)
        return cluster_lists(
            *tensors, size, rows, config.window, config.global_tokens, config.causal_tiles, config.per_group
        )

    def _clusters(self, learned: "SparsefinderParameters", points: Tensor) -> Tensor:
        return assign(points, learned.centroids.float(), self.config.top_clusters)
