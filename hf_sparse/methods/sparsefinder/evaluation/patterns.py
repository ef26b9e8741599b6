"""Make the graphs that a predicted one is compared with, on the same model and with the same number of tiles.

Where the predictor divides its tiles among heads, others have the mean of them, and the oracle as many in each head;
`windows` is the nearest tiles, divided among heads in the same way: what dividing gives is one thing, what predicting
gives another. All have the window and the global tokens of the adapter, which count. Where hashing and routing compare
points, these are the learned projections, or the queries and keys themselves if the adapter has none. In a causal model
a tile is described by queries that are known when it begins, as the method does it; routing, whose centroids take
points of the whole text, and the oracle of tiles of several queries see the future.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.core.overrides import override
from hf_sparse.evaluation.switching import switched
from hf_sparse.methods.sparsefinder.attention import AttentionInputs, Pattern, SparsefinderAttention
from hf_sparse.methods.sparsefinder.evaluation.operating_points import tiles_per_query
from hf_sparse.methods.sparsefinder.fit import fit_budgets
from hf_sparse.methods.sparsefinder.predictors.budgets import divided_tiles
from hf_sparse.ops.entmax import bound_scores, support
from hf_sparse.ops.predictors.clustering import training_points
from hf_sparse.ops.predictors.kmeans import kmeans
from hf_sparse.ops.predictors.pattern_tiles import (
    fixed_scores,
    lsh_scores,
    nearest_scores,
    oracle_scores,
    random_scores,
    routing_scores,
    strided_scores,
)
from hf_sparse.ops.predictors.patterns import lsh_rotations
from hf_sparse.ops.tiles import Tiles, window_and_global
from hf_sparse.ops.tiles.select import best_tiles
from hf_sparse.ops.tiles.tiles import own_tiles, tile_counts

#: The adapter's predictor, patterns that ignore the text, patterns that use it, and the oracle, which no list exceeds.
CONTENDERS = ("predicted", "longformer", "windows", "bigbird", "strided", "fixed", "lsh", "routing", "bound", "oracle")

#: Contenders that are fitted to the measured text, which if anything favours them.
FITTED = ("windows", "routing")

_HASHES = 4  # rounds: the default number of dimensions of the projections


class Patterns:
    """Make the patterns of one attention module.

    Attributes:
        layer: the module.
        centroids: `[Hkv, C, r]` for routing, see `fit_routing`.
        budgets: `[H, MEANS]` for windows, see `fit_windows`.
    """

    def __init__(self, layer: SparsefinderAttention, seed: int) -> None:
        self.layer = layer
        self.seed = seed * 100_003 + layer.layer
        self.centroids: Tensor | None = None
        self.budgets: Tensor | None = None

    def points(self, text: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Return what hashing and routing compare, `[B, Hq, Tq, r]` and `[B, Hkv, Tk, r]` float32."""
        learned = self.layer.parameters_in_use
        if not learned.predictor.learns_graph:
            return text.query.float(), text.key.float()
        return learned.project_queries(text.query), learned.project_keys(text.key)

    def pattern(self, name: str) -> Pattern | None:
        """Return the pattern of a name; `None` is what the adapter predicts. Two of one name choose the same tiles.

        Args:
            name: one of `CONTENDERS`, or `"full"` for all keys.
        """
        if name == "predicted":
            return None
        if name == "full":
            return lambda text: None
        generator = torch.Generator().manual_seed(self.seed)
        scores = {
            "longformer": self._longformer,
            "windows": self._windows,
            "bigbird": self._bigbird,
            "strided": self._strided,
            "fixed": self._fixed,
            "lsh": self._lsh,
            "routing": self._routing,
            "bound": self._bound,
            "oracle": self._oracle,
        }[name]

        def graph(text: AttentionInputs) -> Tiles | Tensor:
            config, causal = self.layer.config, text.causal
            queries, keys, size = text.query.shape[2], text.key.shape[2], config.tile or 1
            own_tile, _ = self._own(text)
            count = tiles_per_query(config, queries, keys, causal)
            learned = self.layer.parameters_in_use
            if name == "oracle" and hasattr(learned, "budgets"):  # it has no fewer in any head
                count = divided_tiles(learned.budgets, count, len(own_tile))
            if name == "windows":
                assert self.budgets is not None
                count = divided_tiles(self.budgets, count, len(own_tile))
            count = count.to(text.key.device) if isinstance(count, Tensor) else count
            window = config.window if config.tile else max(1, config.window)
            joined = window_and_global(
                queries,
                keys,
                size,
                rows=config.rows,
                window=window,
                global_tokens=config.global_tokens,
                causal=causal,
                device=text.key.device,
            )
            ranks = scores(text, count, generator)
            tiles = best_tiles(ranks, count, size=size, rows=config.rows, own=own_tile, causal=causal, always=joined)
            return tiles if config.tile else tiles.edges(queries, keys, causal=causal)

        return graph

    def _longformer(self, text: AttentionInputs, *_: Any) -> Tensor:
        return nearest_scores(*self._own(text))

    def nearest(self, text: AttentionInputs) -> Tensor:
        """Return the scores that windows of each head are fitted by, `[B, H, nq, nk]`."""
        return self._longformer(text).expand(len(text.key), self._heads(text), -1, -1)

    def _windows(self, text: AttentionInputs, *_: Any) -> Tensor:
        return self.nearest(text)

    def _bigbird(self, text: AttentionInputs, count: int | Tensor, generator: torch.Generator) -> Tensor:
        own_tile, total = self._own(text)
        grid = (len(text.key), self._heads(text), len(own_tile), total)
        return random_scores(*grid, generator=generator, device=text.key.device)

    def _strided(self, text: AttentionInputs, count: int | Tensor, _: Any) -> Tensor:
        return strided_scores(count, *self._own(text), causal=text.causal)

    def _fixed(self, text: AttentionInputs, count: int | Tensor, _: Any) -> Tensor:
        return fixed_scores(count, *self._own(text), causal=text.causal)

    def _lsh(self, text: AttentionInputs, count: int | Tensor, _: Any) -> Tensor:
        query, key = self.points(text)
        config, generator = self.layer.config, torch.Generator().manual_seed(self.seed)  # one hash for all texts
        buckets = config.clusters + config.clusters % 2
        rotations = lsh_rotations(query.shape[-1], buckets, _HASHES, generator=generator, device=query.device)
        return lsh_scores(query, key, rotations, **self._tiles, lag=self._lag(text), per_group=config.per_group)

    def _routing(self, text: AttentionInputs, *_: Any) -> Tensor:
        assert self.centroids is not None
        return routing_scores(*self.points(text), self.centroids, **self._tiles, per_group=self.layer.config.per_group)

    def _bound(self, text: AttentionInputs, *_: Any) -> Tensor:
        config = self.layer.config
        return bound_scores(
            text.query,
            text.key,
            **self._tiles,
            alpha=text.alpha,
            scaling=text.scaling,
            causal=text.causal,
            window=max(1, config.window),
            global_tokens=config.global_tokens,
            lag=self._lag(text),
            grouped=config.per_group,
        )

    def _oracle(self, text: AttentionInputs, *_: Any) -> Tensor:
        heads, kv_heads = text.query.shape[1], text.key.shape[1]
        group, alpha = heads // kv_heads, text.alpha
        scores = []
        for number in range(kv_heads):  # a group at a time: probabilities take Tq x Tk
            group_heads = slice(number * group, (number + 1) * group)
            probabilities = support(
                text.query[:, group_heads],
                text.key[:, number, None],
                alpha=alpha[group_heads] if isinstance(alpha, Tensor) else alpha,
                scaling=text.scaling[group_heads],
                causal=text.causal,
            )[1]
            kv_head = 1 if self.layer.config.per_group else None
            scores.append(oracle_scores(probabilities, **self._tiles, kv_heads=kv_head))
        return torch.cat(scores, 1)

    def _heads(self, text: AttentionInputs) -> int:
        return (text.key if self.layer.config.per_group else text.query).shape[1]

    @property
    def _tiles(self) -> dict[str, Any]:
        return {"size": self.layer.config.tile or 1, "rows": self.layer.config.rows}

    def _own(self, text: AttentionInputs) -> tuple[Tensor, int]:
        """Return the own tile of each tile of queries, and the number of tiles of keys."""
        keys = text.key.shape[2]
        listed, total = tile_counts(text.query.shape[2], keys, **self._tiles)
        return own_tiles(listed, keys, **self._tiles, device=text.key.device), total

    def _lag(self, text: AttentionInputs) -> int:
        return (self.layer.config.rows or 1) - 1 if text.causal else 0


@contextmanager
def attending(layers: Sequence[SparsefinderAttention], patterns: Sequence[Pattern | None]) -> Iterator[None]:
    """Let each layer attend by a pattern of its own within a `with` block; `None` is the predicted graph."""
    with ExitStack() as stack:
        stack.enter_context(switched(layers, True))
        for layer, pattern in zip(layers, patterns, strict=True):
            stack.enter_context(override([layer], pattern=pattern))
        yield


@torch.no_grad()
def fit_routing(patterns: Sequence[Patterns], read: Callable[[], Any], seed: int) -> None:
    """Fit the centroids of routing, one k-means per KV head, to what the model reads with all keys.

    Callers read some of the very texts that are measured: if anything, that favours this baseline.
    """
    points_of: dict[int, list[Tensor]] = {}

    def collect(number: int) -> Pattern:
        def all_keys(text: AttentionInputs) -> None:
            query, key = (F.normalize(points, dim=-1) for points in patterns[number].points(text))
            points_of.setdefault(number, []).append(training_points(query, key))

        return all_keys

    layers = [layer_patterns.layer for layer_patterns in patterns]
    with attending(layers, [collect(number) for number in range(len(layers))]):
        read()
    for number, layer_patterns in enumerate(patterns):
        points = torch.cat(points_of[number], 1)
        generator = torch.Generator().manual_seed(seed)
        clusters = min(layer_patterns.layer.config.clusters, points.shape[1])
        layer_patterns.centroids = kmeans(points, clusters, generator=generator)


def fit_windows(patterns: Sequence[Patterns], read: Callable[[], Any]) -> None:
    """Fit the width of the window of each head: tiles divided by what the nearest ones gain, as the predictor's are.

    As for `fit_routing`, reading what is measured favours this baseline.
    """
    patterns_of = {id(layer_patterns.layer): layer_patterns for layer_patterns in patterns}
    layers = [layer_patterns.layer for layer_patterns in patterns]

    def nearest(layer: SparsefinderAttention, text: AttentionInputs) -> Tensor:
        return patterns_of[id(layer)].nearest(text)

    for layer_patterns, table in zip(patterns, fit_budgets(layers, read, nearest), strict=True):
        layer_patterns.budgets = table
