"""Predict graphs from projected queries and keys: each token gets a code, and codes are compared.

The code of a token decides its place in the graph: its clusters, its bins, or its point. A code depends on its token
alone, so a cache keeps it.

Between tiles a predictor estimates how much attention the queries of one give to the keys of another; a tile of queries
may be smaller than one of keys, down to a single query. With points and `-|q - k|^2` as logits that is
`profile(distance) * sum over keys of exp(-|q - k|^2)`, `q` being the mean point of the queries; clustering puts the
nearest centroid in the place of each key, so that a tile of keys is the numbers of its keys in each cluster, or, where
points are cut into parts, a key is the nearest centroids of all parts. This is ours: numbers of pairs in a common
cluster, as the released code has them, rank tiles worse than their distance does (docs/experiments.md).

In a causal model a tile of queries is described by queries that are known when its first token comes: as many as it
has, up to and with its first one. Lists are equally long in every text. So the graph of a text is the same whether it
comes at once or token by token, and no query's depends on later tokens.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.predictors.base import AttentionInputs, Codes, Predictor
from hf_sparse.methods.sparsefinder.predictors.budgets import divided_tiles, mean_tiles
from hf_sparse.ops.predictors.profile import distance_bins
from hf_sparse.ops.predictors.projections import by_group
from hf_sparse.ops.tiles import Tiles, window_and_global
from hf_sparse.ops.tiles.allowed import allowed_edges, tiles_of_valid
from hf_sparse.ops.tiles.select import best_tiles, counts_for_sparsity, step_tiles
from hf_sparse.ops.tiles.tiles import joined, near_edges, own_tiles, tile_counts

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters

# Pairs of tiles that are scored at once.
_PAIRS = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class Span:
    """Place the queries of a batch among its keys; `first_query` and `valid` as in `AttentionInputs`."""

    queries: int
    keys: int
    causal: bool
    first_query: Tensor | None = None
    valid: Tensor | None = None

    @property
    def first(self) -> int | Tensor:
        """Return the position of the first query: a number, or `[B, 1]` int64."""
        return self.keys - self.queries if self.first_query is None else self.first_query[:, None]


class ProjectedPredictor(Predictor):
    """Predict a graph from the codes of queries and keys.

    Subclasses say what a code is (`query_codes`, `key_codes`), which tokens match (`edges`), and how much attention a
    tile is expected to have (`log_scores`).

    Attributes:
        fits_keys_only: whether the predictor is fitted to keys, not to queries and keys together.
        scores_single_keys: whether tiles are scored by the point of each key, which takes the square of the length.
    """

    learns_graph: ClassVar[bool] = True

    @property
    def fits_keys_only(self) -> bool:
        return False

    @property
    def scores_single_keys(self) -> bool:
        return False

    def query_codes(self, learned: "SparsefinderParameters", query: Tensor) -> Tensor:
        """Code queries `[B, Hq, T, D]`: `[B, Hq, T, c]`, int64 buckets or float32 points."""
        return learned.project_queries(query)

    def key_codes(self, learned: "SparsefinderParameters", key: Tensor) -> Tensor:
        """Code keys `[B, Hkv, T, D]`: `[B, Hkv, T, c]`, int64 buckets or float32 points."""
        return learned.project_keys(key)

    def edges(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        """Find the pairs of tokens that match, of the future too, `[B, Hq, Tq, Tk]` bool.

        Args:
            of_queries, of_keys: `[B, Hq, Tq, c]` and `[B, Hkv, Tk, c]`, codes of the queries and of all keys.
        """
        raise NotImplementedError

    def log_scores(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        """Estimate the logarithm of the attention of each pair of tiles without the profile, `[B, Hq, nq, nk]`.

        Args:
            of_queries, of_keys: `[B, Hq, Tk, c]` and `[B, Hkv, Tk, c]`, codes of all tokens.
        """
        raise NotImplementedError

    def graph(self, learned: "SparsefinderParameters", text: AttentionInputs, codes: Codes | None) -> Tiles | Tensor:
        assert codes is not None
        queries, keys = text.query.shape[2], text.key.shape[2]
        return self.predict(learned, *codes, Span(queries, keys, text.causal, text.first_query, text.valid))

    def predict(
        self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span
    ) -> Tiles | Tensor:
        """Predict a graph from codes: tiles, or edges `[B, Hq, Tq, Tk]` bool for `tile=None`.

        Args:
            of_queries, of_keys: `[B, Hq, Tk, c]` and `[B, Hkv, Tk, c]`, codes of all tokens.
        """
        if self.config.tile is None:
            return self._token_graph(learned, of_queries, of_keys, span)
        graphs = []
        for part in self._pieces(of_queries, span):
            graphs.append(self._lists(learned, of_queries[:, :, : part.keys], of_keys[:, :, : part.keys], part))
        return joined(graphs)

    def step_lists(
        self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, position: Tensor
    ) -> Tensor:
        """List the tiles of one causal query per text as `predict` does, in a fixed shape, and with no wait for them.

        Args:
            of_queries, of_keys: `[B, Hq, S, c]` and `[B, Hkv, S, c]`; there may be anything behind the position.
            position: `[B]` int64, where the queries stand.

        Returns:
            `[B, H, 1, m]` int64, see `hf_sparse.ops.tiles.select.step_tiles`.
        """
        config, (size, rows) = self.config, self.tiles
        span = Span(1, of_keys.shape[2], True, position)
        scores = self.tile_scores(learned, of_queries, of_keys, span)
        own_tile = self.own_tiles(span, scores.device)
        return step_tiles(
            scores,
            self.tiles_per_query(learned, own_tile, scores.shape[3], span),
            position,
            size=size,
            rows=rows,
            window=config.window,
            global_tokens=config.global_tokens,
        )

    def tile_scores(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tensor:
        """Estimate how much attention each pair of tiles has, `[B, H, nq, nk]`, in an order of its own.

        Arguments as in `log_scores`; `H` is `Hkv` with `per_group`. Pairs of the future have scores too.
        """
        scores = self.log_scores(learned, of_queries, of_keys, span)
        if self.config.profile:
            distance = (
                torch.arange(scores.shape[3], device=scores.device) - self.own_tiles(span, scores.device)[..., None]
            )
            profile = learned.log_profile[:, distance_bins(distance)]  # [Hq, nq, nk], or [Hq, B, nq, nk]
            scores = scores + (profile if profile.ndim == 3 else profile.transpose(0, 1))
        return by_group(scores, of_keys.shape[1]).logsumexp(2) if self.config.per_group else scores

    def own_tiles(self, span: Span, device: torch.device) -> Tensor:
        """Find the tile of keys in which each tile of queries lies, `[nq]` or `[B, nq]` int64."""
        size, rows = self.tiles
        return own_tiles(self.listed(span), span.keys, size, rows, first_query=span.first_query, device=device)

    @property
    def tiles(self) -> tuple[int, int]:
        """Return the keys and the queries per tile."""
        assert self.config.tile is not None and self.config.rows is not None
        return self.config.tile, self.config.rows

    def listed(self, span: Span) -> int:
        """Count the tiles of queries."""
        size, rows = self.tiles
        if span.first_query is not None:
            return -(-span.queries // rows)
        return tile_counts(span.queries, span.keys, size, rows)[0]

    def described(self, of_queries: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Gather the codes of the queries that describe each tile of queries, `rows` for each.

        Returns:
            Codes `[B, Hq, nq * rows, c]`, and which of them are of queries that exist, `[B, nq * rows]` bool.
        """
        rows = self.tiles[1]
        lag = rows - 1 if span.causal else 0
        position = torch.arange(self.listed(span) * rows, device=of_queries.device) - lag + span.first // rows * rows
        position = position.expand(len(of_queries), -1)
        exists = (position >= 0) & (position < span.keys)
        position = position.clamp(0, span.keys - 1)
        if span.valid is not None:
            exists = exists & span.valid.gather(1, position)
        return _take(of_queries, position), exists

    def tiles_per_query(self, learned: "SparsefinderParameters", own: Tensor, total: int, span: Span) -> int | Tensor:
        """Count the key tiles of each list: a number, or int64 that broadcasts to `[B, H, nq]`.

        Args:
            own: `[nq]` or `[B, nq]` int64, see `own_tiles`.
            total: tiles of keys.
        """
        config = self.config
        mean: int | Tensor
        if span.causal or config.tiles_per_query is not None or span.valid is None:
            mean = mean_tiles(config, own, total, causal=span.causal)
        else:
            size, rows = self.tiles
            reach = tiles_of_valid(span.valid, size).sum(-1, keepdim=True) * tiles_of_valid(span.valid, rows)
            mean = counts_for_sparsity(reach[:, None], config.sparsity)
        return divided_tiles(learned.budgets, mean, own.shape[-1]) if config.head_budgets else mean

    def _lists(self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span) -> Tiles:
        """Predict tiles, all at once."""
        size, rows = self.tiles
        scores = self.tile_scores(learned, of_queries, of_keys, span)
        own_tile = self.own_tiles(span, scores.device)
        return best_tiles(
            scores,
            self.tiles_per_query(learned, own_tile, scores.shape[3], span),
            size=size,
            rows=rows,
            own=own_tile,
            causal=span.causal,
            valid=span.valid,
            always=always_joined(self.config, span, scores.device),
        )

    def _pieces(self, of_queries: Tensor, span: Span) -> list[Span]:
        """Cut the queries into pieces whose pairs of tiles are few enough to be scored at once.

        In a causal model no list depends on later tokens, so the keys of a piece end with its queries.
        """
        if not span.causal:
            return [span]
        size, rows = self.tiles
        pairs = (
            of_queries.shape[0]
            * of_queries.shape[1]
            * (span.keys if self.scores_single_keys else -(-span.keys // size))
        )
        step = max(1, _PAIRS.get(of_queries.device.type, 1 << 24) * rows // max(1, pairs) // size) * size
        if span.first_query is not None:
            return [
                replace(span, queries=min(step, span.queries - begin), first_query=span.first_query + begin)
                for begin in range(0, span.queries, step)
            ]
        first = span.keys - span.queries
        ends = [*range(first // size * size + step, span.keys, step), span.keys]
        return [replace(span, queries=end - begin, keys=end) for begin, end in zip([first, *ends], ends, strict=False)]

    def _token_graph(
        self, learned: "SparsefinderParameters", of_queries: Tensor, of_keys: Tensor, span: Span
    ) -> Tensor:
        config = self.config
        position = torch.arange(span.queries, device=of_keys.device) + span.first
        at_query = position.clamp(max=span.keys - 1).expand(len(of_queries), -1)
        edges = self.edges(learned, _take(of_queries, at_query), of_keys, span)
        reach = {"window": max(1, config.window), "global_tokens": config.global_tokens}
        edges = edges | near_edges(position, span.keys, causal=span.causal, **reach)
        return edges & allowed_edges(position, span.keys, causal=span.causal)


def always_joined(config: SparsefinderConfig, span: Span, device: torch.device) -> Tiles:
    """List the tiles of the window and the global tokens."""
    assert config.tile is not None
    return window_and_global(
        span.queries,
        span.keys,
        config.tile,
        rows=config.rows,
        window=config.window,
        global_tokens=config.global_tokens,
        causal=span.causal,
        first_query=span.first_query,
        device=device,
    )


def _take(codes: Tensor, position: Tensor) -> Tensor:
    """Take the codes `[B, H, T, c]` at positions `[B, L]`: `[B, H, L, c]`."""
    return codes.gather(2, position[:, None, :, None].expand(-1, codes.shape[1], -1, codes.shape[3]))
