"""Quantization: a query and a key are joined iff they are in the same bin in at least one dimension.

`shared` bins lie between boundaries that were fitted on training points, the same for queries and keys. A point's bins
depend on nothing but the point, so a cached key keeps them, and they fit causal models.

`fixed` bins hold `width` tokens each: bin b holds the b-th `width` queries and the b-th `width` keys of that dimension.
The rank of a token is known only when the whole text is, so a causal model would see the future in its pattern, and
cached keys would have to move as tokens arrive. Fixed bins are therefore for encoders, and refuse causal order.

Treviso et al. 2022 (arXiv 2109.12188); boundaries at quantiles are ours.
"""

import torch
from torch import Tensor

from hf_sparse.ops.graphs.buckets import bucket_edges, key_counts, matching_pairs, query_counts, without_padding
from hf_sparse.ops.graphs.points import by_group, check_points, tile_of_query
from hf_sparse.ops.graphs.tiles import tile_counts


def fit_boundaries(points: Tensor, bins: int) -> Tensor:
    """Boundaries at the quantiles of training points, so that bins hold equal shares of them.

    Args:
        points: `[H, N, r]`, queries and keys of the heads together; see `clustering.training_points`.
        bins: per dimension, 2 to `N`.

    Returns:
        `[H, r, bins - 1]` in the dtype of `points`, ascending.

    Raises:
        ValueError: `bins` out of range.
    """
    if points.ndim != 3 or not 2 <= bins <= points.shape[1]:
        raise ValueError(f"expected points [H, N, r] and 2 to N bins, got {tuple(points.shape)} and {bins} bins")
    # Ranks of a sort: torch.quantile refuses large inputs.
    ordered = points.sort(dim=1).values
    at = torch.arange(1, bins, device=points.device) * points.shape[1] // bins
    return ((ordered[:, at - 1] + ordered[:, at]) / 2).transpose(1, 2).contiguous()


def shared_bins(points: Tensor, boundaries: Tensor | None, valid: Tensor | None = None) -> Tensor:
    """Buckets of points between fitted boundaries.

    Args:
        points: `[B, H, T, r]`, the last `T` of `Tk` positions.
        boundaries: `[Hb, r, bins - 1]` with `H` a multiple of `Hb`; consecutive heads share theirs.
        valid: `[B, Tk]` bool, or None.

    Returns:
        `[B, H, T, r]` int64, `dimension * bins + bin`; a point on a boundary is in the bin above it, -1 at padding.

    Raises:
        ValueError: boundaries that do not fit the points, or None (not fitted).
    """
    boundaries = _fitted(points, boundaries)
    bins = boundaries.shape[-1] + 1
    grouped = by_group(points, boundaries.shape[0]).to(boundaries.dtype)  # [B, Hb, G, T, r]
    found = torch.zeros_like(grouped, dtype=torch.int64)
    for edge in range(bins - 1):
        found += grouped >= boundaries[:, None, None, :, edge]
    found += torch.arange(points.shape[3], device=points.device) * bins
    return without_padding(found.flatten(1, 2), valid)


def fixed_bins(points: Tensor, width: int, valid: Tensor | None = None) -> tuple[Tensor, int]:
    """Buckets of `width` points each, by rank in each dimension; of equal points the earlier one has the lower rank.

    Args:
        points: `[B, H, T, r]`, of a whole text.
        width: points per bin, 1 to `T`; the last bin may hold fewer.
        valid: `[B, T]` bool, or None; padding has no rank.

    Returns:
        `[B, H, T, r]` int64, `dimension * bins + rank // width`, -1 at padding; and the number of buckets.

    Raises:
        ValueError: `width` out of range.
    """
    length, rank = points.shape[2:]
    if not 1 <= width <= length:
        raise ValueError(f"a bin must hold 1 to {length} of {length} tokens, got {width}")
    order = _order(points, valid)
    place = torch.arange(length, device=points.device)[:, None].expand_as(order)
    bins = -(-length // width)
    found = torch.empty_like(order).scatter_(2, order, place) // width
    found = found + torch.arange(rank, device=points.device) * bins
    return without_padding(found, valid), rank * bins


def quantization_edges(
    query_points: Tensor,
    key_points: Tensor,
    boundaries: Tensor | None = None,
    *,
    width: int | None = None,
    causal: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """Allowed pairs with a common bin, `[B, Hq, Tq, Tk]` bool: for analysis and short texts.

    Args:
        query_points: `[B, Hq, Tq, r]`; key_points: `[B, Hkv, Tk, r]`.
        boundaries: `[Hkv, r, bins - 1]` for shared bins.
        width: tokens per bin for fixed bins, which need `Tq = Tk` and no causal order.
        causal, valid: as in `allowed_edges`.

    Raises:
        ValueError: neither or both of `boundaries` and `width`, fixed bins with causal order, or input that does not
            fit.
    """
    query, key, buckets = _bins(query_points, key_points, boundaries, width, causal, valid)
    return bucket_edges(query, key, buckets, causal=causal, valid=valid)


def quantization_scores(
    query_points: Tensor,
    key_points: Tensor,
    boundaries: Tensor | None = None,
    *,
    width: int | None = None,
    size: int,
    rows: int | None = None,
    causal: bool,
    valid: Tensor | None = None,
    lag: int = 0,
    per_group: bool = False,
) -> Tensor:
    """Score of each pair of tiles: pairs of tokens with a common bin, once for every dimension in which they have one.

    Costs `nq * nk * r * bins` with shared bins and `r * T * width` with fixed ones.

    Args:
        query_points, key_points, boundaries, width, causal, valid: as in `quantization_edges`.
        size, rows: as in `tile_counts`.
        lag: see `tile_of_query`.
        per_group: add the scores of the query heads that share a KV head.

    Returns:
        `[B, Hq, nq, nk]` (`Hkv` with `per_group`) float32, for `best_tiles`. Pairs of the future count too.

    Raises:
        ValueError: as in `quantization_edges`.
    """
    if width is not None:
        _check_fixed(query_points, key_points, boundaries, width, causal, valid)
        return _fixed_scores(query_points, key_points, width, size, rows or size, valid, lag, per_group)
    query, key, buckets = _bins(query_points, key_points, boundaries, width, causal, valid)
    of_queries = query_counts(query, buckets, keys=key.shape[2], size=rows or size, lag=lag)
    return matching_pairs(of_queries, key_counts(key, buckets, size=size), per_group=per_group)


def _bins(
    query_points: Tensor,
    key_points: Tensor,
    boundaries: Tensor | None,
    width: int | None,
    causal: bool,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    """Buckets of queries `[B, Hq, Tq, r]` and keys `[B, Hkv, Tk, r]`, and their number."""
    if width is not None:
        _check_fixed(query_points, key_points, boundaries, width, causal, valid)
        key, buckets = fixed_bins(key_points, width, valid)
        return fixed_bins(query_points, width, valid)[0], key, buckets
    check_points(query_points, key_points, valid)
    query, key = (shared_bins(points, boundaries, valid) for points in (query_points, key_points))
    return query, key, query.shape[3] * (_fitted(key_points, boundaries).shape[-1] + 1)


def _check_fixed(
    query_points: Tensor, key_points: Tensor, boundaries: Tensor | None, width: int, causal: bool, valid: Tensor | None
) -> None:
    check_points(query_points, key_points, valid)
    if boundaries is not None:
        raise ValueError("bins are shared (boundaries) or fixed (width), got both")
    if causal:
        raise ValueError(
            "fixed bins rank the tokens of a whole text, which a causal model has not seen: use shared bins, whose "
            "boundaries fit_boundaries finds on training text"
        )
    queries, keys = query_points.shape[2], key_points.shape[2]
    if queries != keys:
        raise ValueError(f"fixed bins need the queries of a whole text, got {queries} queries of {keys} keys")
    if not 1 <= width <= keys:
        raise ValueError(f"a bin must hold 1 to {keys} of {keys} tokens, got {width}")


def _fitted(points: Tensor, boundaries: Tensor | None) -> Tensor:
    if boundaries is None:
        raise ValueError("the bins have no boundaries yet: fit them on training text first (fit_boundaries)")
    heads, rank = points.shape[1], points.shape[3]
    if boundaries.ndim != 3 or heads % boundaries.shape[0] or boundaries.shape[1] != rank:
        raise ValueError(
            f"expected boundaries [H, {rank}, bins - 1] with H a divisor of {heads}, got {tuple(boundaries.shape)}"
        )
    return boundaries


def _order(points: Tensor, valid: Tensor | None) -> Tensor:
    """`[B, H, T, r]` int64: the tokens by rank in each dimension, padding behind all others."""
    last = points if valid is None else points.masked_fill(~valid[:, None, :, None], torch.inf)
    return last.argsort(dim=2, stable=True)


def _fixed_scores(
    query_points: Tensor,
    key_points: Tensor,
    width: int,
    size: int,
    rows: int,
    valid: Tensor | None,
    lag: int,
    per_group: bool,
) -> Tensor:
    """Every pair of every bin adds one to its pair of tiles: `r * T * width` additions, however many bins there are."""
    batch, heads, length, _ = query_points.shape
    kv_heads, device = key_points.shape[1], key_points.device
    listed, tiles = tile_counts(length, length, size, rows)
    of_query = _tiles_in_bins(query_points, width, tile_of_query(length, length, rows, lag, device), listed, valid)
    of_key = _tiles_in_bins(key_points, width, torch.arange(length, device=device) // size, tiles, valid)
    # The last row and column take what is in no tile.
    cell = by_group(of_query, kv_heads)[..., None] * (tiles + 1) + of_key[:, :, None, :, None, :]
    cell = cell.flatten(2) if per_group else cell.flatten(1, 2).flatten(2)
    count = torch.zeros((batch, kv_heads if per_group else heads, (listed + 1) * (tiles + 1)), device=device)
    count.scatter_add_(-1, cell, torch.ones((), device=device).expand_as(cell))
    return count.unflatten(-1, (listed + 1, tiles + 1))[..., :listed, :tiles]


def _tiles_in_bins(points: Tensor, width: int, tile: Tensor, tiles: int, valid: Tensor | None) -> Tensor:
    """`[B, H, r * bins, width]` int64: the tile of each member of each bin, `tiles` where there is none."""
    order = _order(points, valid)
    member = tile.clamp(max=tiles)[order]
    if valid is not None:
        member = member.masked_fill(~valid[:, None, :, None].expand_as(order).gather(2, order), tiles)
    member = torch.nn.functional.pad(member.transpose(2, 3), (0, -points.shape[2] % width), value=tiles)
    return member.unflatten(3, (-1, width)).flatten(2, 3)
