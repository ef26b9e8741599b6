"""Predict tiles from mean keys, and attend to all keys where that is as cheap."""

from typing import TYPE_CHECKING

import torch

from hf_sparse.methods.sparsefinder.predictors.base import AttentionInputs, Codes, Predictor
from hf_sparse.ops.entmax import pooled_tiles
from hf_sparse.ops.tiles import Tiles

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class Pooled(Predictor):
    """List the tiles that queries choose by means of keys; nothing is learned. See `hf_sparse.ops.entmax.pooled`.

    Fewer queries than a tile has, as in decoding, attend to all keys, and so do short texts: `exact_up_to`. So a text
    has another graph when it comes token by token, a better one.
    """

    @property
    def prompt_edge(self) -> int:
        assert self.config.rows is not None
        return max(self.config.exact_up_to, self.config.rows - 1)

    def sees_all(self, queries: int, keys: int) -> bool:
        assert self.config.rows is not None
        return queries < self.config.rows or keys <= self.config.exact_up_to

    def graph(self, learned: "SparsefinderParameters", text: AttentionInputs, codes: Codes | None) -> Tiles | None:
        config = self.config
        assert config.tile is not None
        queries = text.query.shape[2]
        if self.sees_all(queries, text.key.shape[2]):
            return None
        query = text.query
        if text.end is not None:  # a tile attends to what any of its queries chooses, and zeros choose nothing
            query = query.masked_fill((torch.arange(queries, device=query.device) >= text.end)[:, None], 0.0)
        return pooled_tiles(
            query,
            text.key,
            size=config.tile,
            rows=config.rows,
            choices=config.choices,
            pool=config.pool,
            scaling=text.scaling,
            causal=text.causal,
            valid=text.valid,
            first_query=text.first_query,
            window=config.window,
            global_tokens=config.global_tokens,
            grouped=config.per_group,
        )
