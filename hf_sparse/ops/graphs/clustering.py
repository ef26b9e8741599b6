"""Clustering: a query and a key are joined iff their nearest centroids have one in common.

Centroids come from k-means on the projected queries and keys of training text, together, one set per KV head. Each
point belongs to its `top` nearest centroids, and any of the query's with any of the key's joins them (the released code
compares rank by rank in one place and always joins the diagonal in another). A key's clusters depend on nothing but the
key, so a cached key keeps them.

`balanced` lets every centroid take its nearest points instead, an equal number each: for encoders, because which points
a centroid takes depends on the whole text.

Treviso et al. 2022 (arXiv 2109.12188); balancing as in the Routing Transformer (Roy et al. 2021, arXiv 2003.05997).
"""

import torch
from torch import Tensor

from hf_sparse.ops.graphs.buckets import bucket_edges, key_counts, matching_pairs, query_counts, without_padding
from hf_sparse.ops.graphs.points import by_group, check_points


def training_points(query_points: Tensor, key_points: Tensor) -> Tensor:
    """Put the queries and keys of each KV head together, for predictors to be fitted on.

    Args:
        query_points: `[B, Hq, T, r]`; key_points: `[B, Hkv, T, r]`, of whole texts.

    Returns:
        `[Hkv, (Hq / Hkv + 1) * B * T, r]`; texts can be put together along dimension 1.
    """
    check_points(query_points, key_points)
    query, key = by_group(query_points, key_points.shape[1]), key_points[:, :, None]
    return torch.cat([query, key], 2).permute(1, 2, 0, 3, 4).flatten(1, 3)  # from [Hkv, G + 1, B, T, r]


def assign(points: Tensor, centroids: Tensor | None, top: int = 1, valid: Tensor | None = None) -> Tensor:
    """The `top` nearest centroids of each point, nearest first; of equal distances the lower index wins.

    Args:
        points: `[B, H, T, r]`, the last `T` of `Tk` positions.
        centroids: `[Hc, C, r]` with `H` a multiple of `Hc`; consecutive heads share theirs.
        top: centroids per point, 1 to `C`.
        valid: `[B, Tk]` bool, or None.

    Returns:
        `[B, H, T, top]` int64, -1 at padding.

    Raises:
        ValueError: centroids that do not fit the points, or None (not fitted), or `top` out of range.
    """
    distance = _distances(points, centroids)
    if not 1 <= top <= distance.shape[-1]:
        raise ValueError(f"a point can belong to 1 to {distance.shape[-1]} of the clusters, got top={top}")
    return without_padding(distance.argsort(dim=-1, stable=True)[..., :top], valid)


def assign_parts(points: Tensor, centroids: Tensor | None, parts: int) -> Tensor:
    """The nearest centroid of each part of each point: product quantization (Jegou et al. 2011).

    Args:
        points, centroids: as in `assign`; the columns of each part are clustered by themselves.
        parts: of equal rank.

    Returns:
        `[B, H, T, parts]` int64.

    Raises:
        ValueError: as in `assign`, or `parts` that does not divide the rank.
    """
    rank = points.shape[-1]
    if parts < 1 or rank % parts:
        raise ValueError(f"points of rank {rank} cannot be cut into {parts} equal parts")
    centroids = _fitted(points, centroids)
    tables = cut_into_parts(centroids.repeat_interleave(points.shape[1] // len(centroids), 0), parts)
    found = assign(cut_into_parts(points.flatten(0, 1), parts).unflatten(0, (len(points), -1)), tables)
    return found[..., 0].unflatten(1, (-1, parts)).transpose(2, 3)


def cut_into_parts(points: Tensor, parts: int) -> Tensor:
    """`[H, N, r]` -> `[H * parts, N, r / parts]`, the parts of a head one after the other."""
    return points.unflatten(-1, (parts, -1)).transpose(1, 2).flatten(0, 1)


def points_of_parts(ids: Tensor, centroids: Tensor) -> Tensor:
    """The points that centroids make up, `[B, H, T, r]`: what `assign_parts` stands for.

    Args:
        ids: `[B, H, T, parts]` int64, as from `assign_parts`.
        centroids: `[H, C, r]`.
    """
    tables = centroids.chunk(ids.shape[-1], -1)  # [H, C, r / parts] each
    head = torch.arange(len(centroids), device=ids.device)[:, None]
    return torch.cat([table[head, ids[..., part]] for part, table in enumerate(tables)], -1)


def assign_balanced(points: Tensor, centroids: Tensor | None, width: int, valid: Tensor | None = None) -> Tensor:
    """The centroids that take each point, when each takes its `width` nearest points.

    Args:
        points: `[B, H, T, r]`, of whole texts.
        centroids, valid: as in `assign`.
        width: points per centroid, at least 1; all valid ones if there are fewer.

    Returns:
        `[B, H, T, C]` int64, column c holds c where centroid c takes the point and -1 elsewhere.

    Raises:
        ValueError: as in `assign`, or `width` below 1.
    """
    if width < 1:
        raise ValueError(f"a centroid must take at least 1 point, got width={width}")
    distance = _distances(points, centroids)
    if valid is not None:
        distance = distance.masked_fill(~valid[:, None, :, None], torch.inf)
    taken = distance.argsort(dim=2, stable=True)[:, :, :width]
    cluster = torch.arange(distance.shape[3], device=points.device).expand_as(taken)
    return without_padding(torch.full_like(distance, -1, dtype=torch.int64).scatter_(2, taken, cluster), valid)


def balanced_width(tokens: int, clusters: int, top: int = 1) -> int:
    """Points per centroid at which each point is taken `top` times on average, `ceil(top * tokens / clusters)`."""
    return max(1, -(-top * tokens // clusters))


def clustering_edges(
    query_points: Tensor,
    key_points: Tensor,
    centroids: Tensor | None,
    *,
    top: int = 1,
    balanced: bool = False,
    causal: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """Allowed pairs with a common cluster, `[B, Hq, Tq, Tk]` bool: for analysis and short texts.

    Args:
        query_points: `[B, Hq, Tq, r]`; key_points: `[B, Hkv, Tk, r]`.
        centroids: `[Hkv, C, r]`, see `kmeans`.
        top: clusters per point, 1 to `C`.
        balanced: let each centroid take its `balanced_width(Tk, C, top)` nearest queries and keys; needs `Tq = Tk` and
            no causal order.
        causal, valid: as in `allowed_edges`.

    Raises:
        ValueError: no centroids (not fitted), input that does not fit, or `balanced` with causal order.
    """
    query, key, clusters = _clusters(query_points, key_points, centroids, top, balanced, causal, valid)
    return bucket_edges(query, key, clusters, causal=causal, valid=valid)


def clustering_scores(
    query_points: Tensor,
    key_points: Tensor,
    centroids: Tensor | None,
    *,
    top: int = 1,
    balanced: bool = False,
    size: int,
    rows: int | None = None,
    causal: bool,
    valid: Tensor | None = None,
    lag: int = 0,
    per_group: bool = False,
) -> Tensor:
    """Score of each pair of tiles: pairs of tokens with a common cluster, once for each that they have in common.

    Costs `T * C * r + nq * nk * C`.

    Args:
        query_points, key_points, centroids, top, balanced, causal, valid: as in `clustering_edges`.
        size, rows: as in `tile_counts`.
        lag: see `tile_of_query`.
        per_group: add the scores of the query heads that share a KV head.

    Returns:
        `[B, Hq, nq, nk]` (`Hkv` with `per_group`) float32, for `best_tiles`. Pairs of the future count too.

    Raises:
        ValueError: as in `clustering_edges`.
    """
    query, key, clusters = _clusters(query_points, key_points, centroids, top, balanced, causal, valid)
    of_queries = query_counts(query, clusters, keys=key.shape[2], size=rows or size, lag=lag)
    of_keys = key_counts(key, clusters, size=size)
    return matching_pairs(of_queries, of_keys, per_group=per_group)


def _clusters(
    query_points: Tensor,
    key_points: Tensor,
    centroids: Tensor | None,
    top: int,
    balanced: bool,
    causal: bool,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    check_points(query_points, key_points, valid)
    clusters = _fitted(key_points, centroids).shape[1]
    if not balanced:
        query, key = (assign(points, centroids, top, valid) for points in (query_points, key_points))
        return query, key, clusters
    queries, keys = query_points.shape[2], key_points.shape[2]
    if causal or queries != keys:
        raise ValueError(
            "balanced clusters rank the tokens of a whole text, which a causal model has not seen: use balanced=False"
            if causal
            else f"balanced clusters need the queries of a whole text, got {queries} queries of {keys} keys"
        )
    width = balanced_width(keys, clusters, top)
    query, key = (assign_balanced(points, centroids, width, valid) for points in (query_points, key_points))
    return query, key, clusters


def _fitted(points: Tensor, centroids: Tensor | None) -> Tensor:
    if centroids is None:
        raise ValueError("the clusters have no centroids yet: fit them on training text first (kmeans)")
    heads, rank = points.shape[1], points.shape[3]
    if centroids.ndim != 3 or heads % centroids.shape[0] or centroids.shape[2] != rank:
        raise ValueError(f"expected centroids [H, C, {rank}] with H a divisor of {heads}, got {tuple(centroids.shape)}")
    return centroids


def _distances(points: Tensor, centroids: Tensor | None) -> Tensor:
    """Squared, `[B, H, T, C]`; point by point, so that no result depends on which others are there."""
    centroids = _fitted(points, centroids)
    grouped = by_group(points.to(centroids.dtype), centroids.shape[0])[..., None, :]
    return (grouped - centroids[:, None, None]).square().sum(-1).flatten(1, 2)
