"""From queries and keys to a graph: every predictor codes tokens one by one, and compares codes.

A code is what a token's place in the graph is decided by: its clusters, its bins, or its point. A code depends on its
token alone, so a cache keeps it.

Between tiles a predictor estimates how much attention the queries of one give to the keys of another; a tile of queries
may be smaller than one of keys, down to a single query. With points and `-|q - k|^2` as logits that is
`profile(distance) * sum over keys of exp(-|q - k|^2)`, `q` being the mean point of the queries; clustering puts the
nearest centroid in the place of each key, so that a tile of keys is the numbers of its keys in each cluster, or, where
points are cut into parts, a key is the nearest centroids of all parts. This is ours: numbers of pairs in a common
cluster, as the released code has them, rank tiles worse than their distance does (docs/experiments.md).

In a causal model a tile of queries is described by queries that are known when its first token comes (`lag`, see
`tile_of_query`), and lists are equally long in every text. So the graph of a text is the same whether it comes at once
or token by token, and no query's depends on later tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.parameters import MEANS, SparsefinderParameters
from hf_sparse.ops.graphs import Tiles, window_and_global
from hf_sparse.ops.graphs.buckets import bucket_edges, key_counts, matching_pairs, query_counts
from hf_sparse.ops.graphs.clustering import (
    assign,
    assign_parts,
    clustering_edges,
    clustering_scores,
    points_of_parts,
)
from hf_sparse.ops.graphs.distance import distance_edges, squared_distances
from hf_sparse.ops.graphs.points import by_group, tile_means, tile_of_query
from hf_sparse.ops.graphs.profile import distance_bins
from hf_sparse.ops.graphs.quantization import quantization_edges, quantization_scores, shared_bins
from hf_sparse.ops.graphs.select import best_tiles, tiles_for_sparsity
from hf_sparse.ops.graphs.tiles import joined, own_tiles, tile_counts

# Pairs of tiles that are scored at once.
_PAIRS = {"cpu": 1 << 22, "cuda": 1 << 26}


def query_codes(learned: SparsefinderParameters, query: Tensor) -> Tensor:
    """Codes `[B, Hq, T, c]` of queries `[B, Hq, T, D]`: int64 buckets, or float32 points."""
    points = learned.project_queries(query)
    return points if learned.config.of_points else _codes(learned, points)


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
    if not causal:
        return _lists(learned, of_queries, of_keys, queries, causal)
    # No list depends on later tokens, so that of a text can be found piece by piece, each with what comes before it.
    pairs = of_queries.shape[0] * of_queries.shape[1] * (keys if config.of_single_keys else -(-keys // size))
    step = max(1, _PAIRS.get(of_keys.device.type, 1 << 24) * (config.rows or 1) // max(1, pairs) // size) * size
    ends = [*range((first // size) * size + step, keys, step), keys]
    parts = []
    for end in ends:
        parts.append(_lists(learned, of_queries[:, :, :end], of_keys[:, :, :end], end - first, causal))
        first = end
    return joined(parts)


def _lists(learned: SparsefinderParameters, of_queries: Tensor, of_keys: Tensor, queries: int, causal: bool) -> Tiles:
    """`predicted_graph` of tiles, all at once."""
    config, keys = learned.config, of_keys.shape[2]
    assert config.tile is not None
    scores = tile_scores(learned, of_queries, of_keys, queries=queries, causal=causal)
    near = always_joined(config, queries, keys, causal=causal, device=of_keys.device)
    own = own_tiles(scores.shape[2], keys, config.tile, config.rows, device=of_keys.device)
    count = tiles_per_query(learned, own, scores.shape[3], causal)
    return best_tiles(scores, count, size=config.tile, rows=config.rows, own=own, causal=causal, always=near)


def tile_scores(
    learned: SparsefinderParameters, of_queries: Tensor, of_keys: Tensor, *, queries: int, causal: bool
) -> Tensor:
    """How much attention each pair of tiles is expected to have, `[B, H, nq, nk]`, in an order of its own.

    Arguments as in `predicted_graph`; `H` is `Hkv` with `per_group`. Pairs of the future have scores too.
    """
    config, keys = learned.config, of_keys.shape[2]
    size, rows = config.tile, config.rows
    assert size is not None and rows is not None
    lag = rows - 1 if causal else 0
    described_from = max(0, (keys - queries) // rows * rows - lag)
    listed = tile_counts(queries, keys, size, rows)[0]
    seen = of_queries[:, :, described_from:]
    own = own_tiles(listed, keys, size, rows, device=of_keys.device)
    if config.of_points:
        scores = _weighed(learned, _log_mass(learned, seen, of_keys, lag)[:, :, -listed:], own)
    else:
        counts = _matches(learned, seen, of_keys, causal, lag)[:, :, -listed:]
        scores = _weighed(learned, (counts + 1).log(), own)  # where nothing matches, the profile decides
    return _by_group(scores, of_keys) if config.per_group else scores


def mean_tiles_per_query(config: SparsefinderConfig, own: Tensor, total: int, causal: bool) -> int | Tensor:
    """Key tiles of each query tile, over heads the mean: a number, or `[nq]` int64.

    Args:
        own: `[nq]` int64, see `own_tiles`.
        total: tiles of keys.
        causal: whether queries see earlier keys only.
    """
    if not causal and config.tiles_per_query is None:
        return tiles_for_sparsity(config.sparsity, len(own), total, own=own, causal=False)
    return config.causal_tiles


def tiles_per_query(learned: SparsefinderParameters, own: Tensor, total: int, causal: bool) -> int | Tensor:
    """The same of each list, `[1, H, nq]` int64, where budgets of heads were fitted."""
    mean = mean_tiles_per_query(learned.config, own, total, causal)
    if not learned.config.head_budgets:
        return mean
    return divided_tiles(learned.budgets, mean, len(own))


def divided_tiles(budgets: Tensor, mean: int | Tensor, listed: int) -> Tensor:
    """`[1, H, listed]` int64, from a table `[H, MEANS]` and the mean number of tiles, a number or `[listed]`."""
    wanted = torch.as_tensor(mean, device=budgets.device).expand(listed)
    counts = budgets[:, wanted.clamp(max=MEANS) - 1] * (wanted / MEANS).clamp(min=1)
    return counts.round().long()[None]


def always_joined(config: SparsefinderConfig, queries: int, keys: int, *, causal: bool, device: torch.device) -> Tiles:
    """Tiles of the window and the global tokens."""
    assert config.tile is not None
    options: dict[str, Any] = {"size": config.tile, "rows": config.rows, "window": config.window}
    return _near(config, queries, keys, causal=causal, device=device, **options)


def _near(config: SparsefinderConfig, queries: int, keys: int, *, size: int, **options: Any) -> Tiles:
    return window_and_global(queries, keys, size, global_tokens=config.global_tokens, **options)


def _codes(learned: SparsefinderParameters, points: Tensor) -> Tensor:
    config = learned.config
    if config.needs_whole_text or config.predictor == "distance":
        return points
    if config.predictor == "clustering":
        if config.of_points:
            return assign_parts(points, learned.centroids.float(), config.cluster_parts)
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


def _log_mass(learned: SparsefinderParameters, of_queries: Tensor, of_keys: Tensor, lag: int) -> Tensor:
    """`[B, Hq, n, nk]`: logarithm of the sum of `exp(-|q - k|^2)` over the keys of a tile, `q` the mean of a tile."""
    queries, keys = of_queries.shape[2], of_keys.shape[2]
    size, rows = learned.config.tile, learned.config.rows
    assert size is not None and rows is not None
    listed, total = tile_counts(queries, keys, size, rows)
    tile = tile_of_query(queries, keys, rows, lag, of_queries.device)
    mean, _ = tile_means(of_queries, tile, listed)
    if learned.config.predictor == "clustering" and learned.config.cluster_parts > 1:
        of_keys = points_of_parts(of_keys, learned.centroids.float())
    if learned.config.of_single_keys:
        # One product makes -|q - k|^2 = 2 q k - |k|^2 - |q|^2. In float64, and rounded: products of other shapes round
        # differently, and the graph must not depend on them.
        query, key = mean.double(), F.pad(of_keys.double(), (0, 0, 0, -keys % size))
        length = key.square().sum(-1, keepdim=True)
        length[:, :, keys:] = 1e30  # nothing is near to what is not there
        key = torch.cat([key, length, torch.ones_like(length)], -1)
        length = query.square().sum(-1, keepdim=True)
        query = by_group(torch.cat([2 * query, -torch.ones_like(length), -length], -1), key.shape[1])
        near = (query @ key[:, :, None].transpose(-1, -2)).float().flatten(1, 2)
        return near.unflatten(3, (total, size)).logsumexp(4)
    centroids = learned.centroids.float()
    distance = squared_distances(mean, centroids[None].expand(len(mean), -1, -1, -1))
    weight = (distance.amin(-1, keepdim=True) - distance).double().exp()
    count = key_counts(of_keys, learned.config.clusters, size=size).double()
    mass = by_group(weight, count.shape[1]) @ count[:, :, None].transpose(-1, -2)
    return mass.flatten(1, 2).clamp(min=1e-30).log().float()


def _weighed(learned: SparsefinderParameters, log_scores: Tensor, own: Tensor) -> Tensor:
    """Logarithmic scores `[B, Hq, n, nk]` plus the logarithm of the profile at each distance."""
    if not learned.config.profile:
        return log_scores
    bins = distance_bins(torch.arange(log_scores.shape[3], device=own.device) - own[:, None])
    return log_scores + learned.log_profile[:, bins]


def _by_group(log_scores: Tensor, of_keys: Tensor) -> Tensor:
    """Of all query heads of a group together, `[B, Hkv, n, nk]`."""
    return by_group(log_scores, of_keys.shape[1]).logsumexp(2)


def _matches(learned: SparsefinderParameters, of_queries: Tensor, of_keys: Tensor, causal: bool, lag: int) -> Tensor:
    """`[B, Hq, n, nk]`: pairs of tokens that share a bucket."""
    config = learned.config
    assert config.tile is not None and config.rows is not None
    if not config.needs_whole_text:
        counts = query_counts(of_queries, _buckets(config), keys=of_keys.shape[2], size=config.rows, lag=lag)
        return matching_pairs(counts, key_counts(of_keys, _buckets(config), size=config.tile))
    options: dict[str, Any] = {"size": config.tile, "rows": config.rows, "lag": lag, "causal": causal}
    if config.predictor == "quantization":
        return quantization_scores(of_queries, of_keys, width=config.bin_width, **options)
    balanced: dict[str, Any] = {"top": config.top_clusters, "balanced": True}
    return clustering_scores(of_queries, of_keys, learned.centroids.float(), **balanced, **options)
