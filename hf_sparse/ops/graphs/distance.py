"""Distance: a query and a key are joined iff their projected points are near.

Between tokens this is `O(Tq * Tk * r)`, so it is for analysis only. Between tiles the means of the tiles stand for
their tokens.

Treviso et al. 2022 (arXiv 2109.12188), squared Euclidean distance, the one that the projections are trained with.
"""

import torch
from torch import Tensor

from hf_sparse.ops.graphs.allowed import allowed_edges, positions_of
from hf_sparse.ops.graphs.points import by_group, check_points, tile_means, tile_of_query
from hf_sparse.ops.graphs.tiles import tile_counts


def squared_distances(query: Tensor, key: Tensor) -> Tensor:
    """`[B, Hq, Tq, Tk]` from points `[B, Hq, Tq, r]` and `[B, Hkv, Tk, r]`; float32, or float64 for float64.

    Dimension by dimension, so that the distance of two points does not depend on which others are there.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    of_query, of_key = by_group(query.to(wide), key.shape[1]), key.to(wide)[:, :, None]
    total = of_query.new_zeros((*of_query.shape[:4], key.shape[2]))
    for dim in range(query.shape[3]):
        total += (of_query[..., dim, None] - of_key[..., None, :, dim]).square()
    return total.flatten(1, 2)


def distance_edges(
    query_points: Tensor, key_points: Tensor, threshold: float | Tensor, *, causal: bool, valid: Tensor | None = None
) -> Tensor:
    """Allowed pairs whose squared distance is below the threshold, `[B, Hq, Tq, Tk]` bool. For analysis: `O(Tq Tk r)`.

    Args:
        query_points: `[B, Hq, Tq, r]`, the last `Tq` of `Tk` positions.
        key_points: `[B, Hkv, Tk, r]`.
        threshold: a number, or one per query head, `[Hq]`; strict.
        causal, valid: as in `allowed_edges`.

    Raises:
        ValueError: points that do not fit.
    """
    check_points(query_points, key_points, valid)
    if isinstance(threshold, Tensor) and threshold.ndim:
        threshold = threshold[:, None, None]
    position = positions_of(query_points.shape[2], key_points.shape[2], device=key_points.device)
    near = squared_distances(query_points, key_points) < threshold
    return near & allowed_edges(position, key_points.shape[2], causal=causal, valid=valid)


def distance_scores(
    query_points: Tensor,
    key_points: Tensor,
    *,
    size: int,
    valid: Tensor | None = None,
    parts: int = 1,
    lag: int = 0,
    per_group: bool = False,
) -> Tensor:
    """Score of each pair of tiles: minus the least squared distance of their representatives.

    Each tile is cut into `parts` equal stretches, and the mean point of each stretch represents it. The pairs above
    `-threshold` are the block-level graph at that threshold; `best_tiles` takes a given number instead.

    Args:
        query_points: `[B, Hq, Tq, r]`; key_points: `[B, Hkv, Tk, r]`.
        size: positions per tile.
        valid: `[B, Tk]` bool, or None.
        parts: representatives per tile, a divisor of `size`.
        lag: see `tile_of_query`.
        per_group: add the scores of the query heads that share a KV head.

    Returns:
        `[B, Hq, nq, nk]` (`Hkv` with `per_group`) float32 or float64, at most 0; `-inf` where a tile is empty.

    Raises:
        ValueError: points that do not fit, or `parts` no divisor of `size`.
    """
    check_points(query_points, key_points, valid)
    if parts < 1 or size % parts:
        raise ValueError(f"parts must divide the tile size, got parts={parts} and size={size}")
    queries, keys = query_points.shape[2], key_points.shape[2]
    listed, total = tile_counts(queries, keys, size)
    tile = tile_of_query(queries, keys, size, lag, query_points.device)
    at = torch.arange(keys, device=key_points.device)
    stretch = size // parts
    inside = (at[keys - queries :] + lag) % size // stretch
    query, has_query = tile_means(query_points, tile * parts + inside, listed * parts, valid)
    key, has_key = tile_means(key_points, at // stretch, total * parts, valid)
    exists = has_query[..., None] & has_key[..., None, :]
    score = (-squared_distances(query, key)).masked_fill(~exists, -torch.inf)
    score = score.unflatten(3, (total, parts)).unflatten(2, (listed, parts)).amax((3, 5))
    return by_group(score, key_points.shape[1]).sum(2) if per_group else score
