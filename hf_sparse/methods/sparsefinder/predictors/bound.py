"""Predict every tile that the extremes of its keys do not exclude."""

from typing import TYPE_CHECKING

from hf_sparse.methods.sparsefinder.predictors.base import AttentionInputs, Codes, Predictor
from hf_sparse.ops.entmax import bound_tiles
from hf_sparse.ops.tiles import Tiles

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class Bound(Predictor):
    """List every tile that may hold support, which is exact; nothing is learned. See `hf_sparse.ops.entmax.bound`."""

    finds_support = True

    def graph(self, learned: "SparsefinderParameters", text: AttentionInputs, codes: Codes | None) -> Tiles:
        config = self.config
        assert config.tile is not None
        return bound_tiles(
            text.query,
            text.key,
            size=config.tile,
            rows=config.rows,
            alpha=text.alpha,
            scaling=text.scaling,
            causal=text.causal,
            valid=text.valid,
            first_query=text.first_query,
            window=max(1, config.window),
            global_tokens=config.global_tokens,
            grouped=config.per_group,
        )
