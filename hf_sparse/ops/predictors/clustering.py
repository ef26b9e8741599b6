"""Join a query and a key iff they share one of their nearest centroids.

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

from hf_sparse.ops.predictors.buckets import clear_padding
from hf_sparse.ops.predictors.projections import by_group, check_points


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


def assign(points: Tensor, centroids: Tensor | None, top: int = 1) -> Tensor:
    """Find the `top` nearest centroids of each point, nearest first; of equal distances the lower index wins.

    Args:
        points: `[B, H, T, r]`.
        centroids: `[Hc, C, r]` with `H` a multiple of `Hc`; consecutive heads share theirs.
        top: centroids per point, 1 to `C`.

    Returns:
        `[B, H, T, top]` int64.

    Raises:
        ValueError: centroids that do not fit the points, or None (not fitted), or `top` out of range.
    """
    distance = _distances(points, centroids)
    if not 1 <= top <= distance.shape[-1]:
        raise ValueError(f"a point can belong to 1 to {distance.shape[-1]} of the clusters, got top={top}")
    return distance.argsort(dim=-1, stable=True)[..., :top]


def assign_parts(points: Tensor, centroids: Tensor | None, parts: int) -> Tensor:
    """Find the nearest centroid of each part of each point: product quantization (Jegou et al. 2011).

    Args:
        points, centroids: as in `assign`; the columns of each part are clustered by themselves.
        parts: number of parts, which have equal rank.

    Returns:
        `[B, H, T, parts]` int64.

    Raises:
        ValueError: as in `assign`, or `parts` that does not divide the rank.
    """
    rank = points.shape[-1]
    if parts < 1 or rank % parts:
        raise ValueError(f"expected parts that divide the rank {rank} of the points, got parts={parts}")
    centroids = _fitted(points, centroids)
    tables = cut_into_parts(centroids.repeat_interleave(points.shape[1] // len(centroids), 0), parts)
    nearest = assign(cut_into_parts(points.flatten(0, 1), parts).unflatten(0, (len(points), -1)), tables)
    return nearest[..., 0].unflatten(1, (-1, parts)).transpose(2, 3)


def cut_into_parts(points: Tensor, parts: int) -> Tensor:
    """Cut `[H, N, r]` into `[H * parts, N, r / parts]`, the parts of a head one after the other."""
    return points.unflatten(-1, (parts, -1)).transpose(1, 2).flatten(0, 1)


def points_of_parts(ids: Tensor, centroids: Tensor) -> Tensor:
    """Put together the points `[B, H, T, r]` whose parts are the centroids that `assign_parts` found.

    Args:
        ids: `[B, H, T, parts]` int64, as from `assign_parts`.
        centroids: `[H, C, r]`.
    """
    tables = centroids.chunk(ids.shape[-1], -1)  # [H, C, r / parts] each
    head = torch.arange(len(centroids), device=ids.device)[:, None]
    return torch.cat([table[head, ids[..., part]] for part, table in enumerate(tables)], -1)


def assign_balanced(
    points: Tensor, centroids: Tensor | None, width: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """Let each centroid take its `width` nearest points.

    Args:
        points: `[B, H, T, r]`, of whole texts.
        centroids: as in `assign`.
        width: points per centroid, at least 1, a number or `[B]` int64; all valid ones if there are fewer.
        valid: `[B, T]` bool, False for padding, which no centroid takes; or None.

    Returns:
        `[B, H, T, C]` int64, column c holds c where centroid c takes the point and -1 elsewhere.

    Raises:
        ValueError: as in `assign`, or `width` below 1.
    """
    widest, least = (int(width.max()), int(width.min())) if isinstance(width, Tensor) else (width, width)
    if least < 1:
        raise ValueError(f"a centroid must take at least 1 point, got width={least}")
    distance = _distances(points, centroids)
    if valid is not None:
        distance = distance.masked_fill(~valid[:, None, :, None], torch.inf)
    taken = distance.argsort(dim=2, stable=True)[:, :, :widest]
    cluster = torch.arange(distance.shape[3], device=points.device).expand_as(taken)
    if isinstance(width, Tensor):
        place = torch.arange(taken.shape[2], device=points.device)[:, None]
        cluster = cluster.masked_fill(place >= width[:, None, None, None], -1)
    return clear_padding(torch.full_like(distance, -1, dtype=torch.int64).scatter_(2, taken, cluster), valid)


def balanced_width(tokens: int | Tensor, clusters: int, top: int = 1) -> int | Tensor:
    """Count the points per centroid at which each is taken `top` times on average, `ceil(top * tokens / clusters)`."""
    width = -(-top * tokens // clusters)
    return width.clamp(min=1) if isinstance(width, Tensor) else max(1, width)


def _fitted(points: Tensor, centroids: Tensor | None) -> Tensor:
    if centroids is None:
        raise ValueError("expected fitted centroids, got None: fit them to training text first (kmeans)")
    heads, rank = points.shape[1], points.shape[3]
    if centroids.ndim != 3 or heads % centroids.shape[0] or centroids.shape[2] != rank:
        raise ValueError(f"expected centroids [H, C, {rank}] with H a divisor of {heads}, got {tuple(centroids.shape)}")
    return centroids


def _distances(points: Tensor, centroids: Tensor | None) -> Tensor:
    """Compute squared distances `[B, H, T, C]`, each from its own point alone, whatever the other points are."""
    centroids = _fitted(points, centroids)
    grouped = by_group(points.to(centroids.dtype), centroids.shape[0])[..., None, :]
    return (grouped - centroids[:, None, None]).square().sum(-1).flatten(1, 2)
