"""From queries and keys to a graph: every predictor codes tokens one by one, and compares codes.

A code is what a token's place in the graph is decided by: its clusters, its bins, or, where that takes a whole text or
a distance, its point. A code depends on its token alone, so a cache keeps it.

In a causal model a tile of queries is described by queries that are known when its first token comes (`lag`, see
`tile_of_query`), and lists are equally long in every text. So the graph of a text is the same whether it comes at once
or token by token, and no query's depends on later tokens.
"""

from typing import Any

from torch import Tensor

from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters
from hf_sparse.ops.graphs import Tiles, window_and_global
from hf_sparse.ops.graphs.buckets import bucket_edges, key_counts, matching_pairs, query_counts
from hf_sparse.ops.graphs.clustering import assign, clustering_edges, clustering_scores
from hf_sparse.ops.graphs.distance import distance_edges, distance_scores
from hf_sparse.ops.graphs.quantization import quantization_edges, quantization_scores, shared_bins
from hf_sparse.ops.graphs.select import best_tiles, tiles_for_sparsity
from hf_sparse.ops.graphs.tiles import tile_counts


def query_codes(learned: SparsefinderParameters, query: Tensor) -> Tensor:
    """Codes `[B, Hq, T, c]` of queries `[B, Hq, T, D]`: int64 buckets, or float32 points."""
    return _codes(learned, learned.project_queries(query))


def key_codes(learned: SparsefinderParameters, key: Tensor) -> Tensor:
    """Codes `[B, Hkv, T, c]` of keys `[B, Hkv, T, D]`."""
    return _codes(learned, learned.project_keys(key))


def predicted_graph(
    learned: SparsefinderParameters, of_queries: Tensor, of_keys: Tensor, *, queries: int, causal: bool
) -> Tiles | Tensor:
    """The graph of the last `queries` tokens of a text without padding.

    Args:
        of_queries, of_keys: `[B, Hq, Tk, c]` and `[B, Hkv, Tk, c]`, codes of all tokens.
        queries: `Tq`.
        causal: whether queries see earlier keys only.

    Returns:
        Tiles, or edges `[B, Hq, Tq, Tk]` bool for `tile=None`.
    """
    config, keys, size = learned.config, of_keys.shape[2], learned.config.tile
    first = keys - queries
    if size is None:
        edges = _edges(learned, of_queries[:, :, first:], of_keys, causal)
        near = _near(config, queries, keys, size=1, window=max(1, config.window), causal=causal, device=of_keys.device)
        return edges | near.edges(queries, keys, causal=causal)
    lag = size - 1 if causal else 0
    described_from = max(0, first // size * size - lag)
    listed, total = tile_counts(queries, keys, size)
    scores = _scores(learned, of_queries[:, :, described_from:], of_keys, causal, size, lag)[:, :, -listed:]
    near = _near(config, queries, keys, size=size, window=config.window, causal=causal, device=of_keys.device)
    count = tiles_per_query(config, listed, total, causal)
    return best_tiles(scores, count, size=size, causal=causal, always=near)


def tiles_per_query(config: SparsefinderConfig, listed: int, total: int, causal: bool) -> int | Tensor:
    """Key tiles of each of the `listed` last of `total` query tiles: a number, or `[listed]` int64."""
    if not causal and config.tiles_per_query is None:
        return tiles_for_sparsity(config.sparsity, listed, total, causal=False)
    return config.causal_tiles


def _near(config: SparsefinderConfig, queries: int, keys: int, *, size: int, window: int, **options: Any) -> Tiles:
    return window_and_global(queries, keys, size, window=window, global_tokens=config.global_tokens, **options)


def _codes(learned: SparsefinderParameters, points: Tensor) -> Tensor:
    config = learned.config
    if config.needs_whole_text or config.predictor == "distance":
        return points
    if config.predictor == "clustering":
        return assign(points, learned.centroids.float(), config.top_clusters)
    return shared_bins(points, learned.boundaries.float())


def _buckets(config: SparsefinderConfig) -> int:
    return config.clusters if config.predictor == "clustering" else config.rank * config.bins


def _edges(learned: SparsefinderParameters, of_queries: Tensor, of_keys: Tensor, causal: bool) -> Tensor:
    config = learned.config
    if config.predictor == "distance":
        return distance_edges(of_queries, of_keys, config.threshold, causal=causal)
    if not config.needs_whole_text:
        return bucket_edges(of_queries, of_keys, _buckets(config), causal=causal)
    if config.predictor == "quantization":
        return quantization_edges(of_queries, of_keys, width=config.bin_width, causal=causal)
    top = config.top_clusters
    return clustering_edges(of_queries, of_keys, learned.centroids.float(), top=top, balanced=True, causal=causal)


def _scores(
    learned: SparsefinderParameters, of_queries: Tensor, of_keys: Tensor, causal: bool, size: int, lag: int
) -> Tensor:
    """`[B, H, n, nk]` of the `n` tiles that hold the last queries; how good each pair of tiles is."""
    config = learned.config
    tiles: dict[str, Any] = {"size": size, "lag": lag, "per_group": config.per_group}
    if config.predictor == "distance":
        return distance_scores(of_queries, of_keys, **tiles)
    if not config.needs_whole_text:
        counts = query_counts(of_queries, _buckets(config), keys=of_keys.shape[2], size=size, lag=lag)
        return matching_pairs(counts, key_counts(of_keys, _buckets(config), size=size), per_group=config.per_group)
    if config.predictor == "quantization":
        return quantization_scores(of_queries, of_keys, width=config.bin_width, causal=causal, **tiles)
    balanced: dict[str, Any] = {"top": config.top_clusters, "balanced": True, "causal": causal}
    return clustering_scores(of_queries, of_keys, learned.centroids.float(), **balanced, **tiles)
