"""Predict by distance: tokens with near points match; between tiles every key is scored, at a quadratic cost."""

from typing import TYPE_CHECKING

from torch import Tensor

from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor, Span
from hf_sparse.ops.predictors.distance import squared_distances, tile_log_mass
from hf_sparse.ops.predictors.projections import tile_means

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class Distance(ProjectedPredictor):
    """Compare points; nothing is fitted."""

    @property
    def fits_keys_only(self) -> bool:
        return self.config.tile is not None

    @property
    def scores_single_keys(self) -> bool:
        return True

    def edges(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        return squared_distances(of_queries, of_keys) < self.config.threshold

    def log_scores(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        size, rows = self.tiles
        return tile_log_mass(tile_means(*self.described(of_queries, span), rows), of_keys, size, span.valid)
