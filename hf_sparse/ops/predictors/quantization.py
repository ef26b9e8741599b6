"""Join a query and a key iff they are in the same bin in at least one dimension (quantization).

`shared` bins lie between boundaries that were fitted on training points, the same for queries and keys. A point's bins
depend on nothing but the point, so a cached key keeps them, and they fit causal models.

`fixed` bins hold `width` tokens each: bin b holds the b-th `width` queries and the b-th `width` keys of that dimension.
The rank of a token is known only when the whole text is, so a causal model would see the future in its pattern, and
cached keys would have to move as tokens arrive. Fixed bins are therefore for encoders, and refuse causal order.

Treviso et al. 2022 (arXiv 2109.12188); boundaries at quantiles are ours.
"""

import torch
from torch import Tensor

from hf_sparse.ops.predictors.buckets import clear_padding
from hf_sparse.ops.predictors.projections import by_group, check_points
from hf_sparse.ops.tiles.tiles import tile_counts


def fit_boundaries(points: Tensor, bins: int) -> Tensor:
    """Place boundaries at the quantiles of training points, so that bins hold equal shares of them.

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
    cut = torch.arange(1, bins, device=points.device) * points.shape[1] // bins
    return ((ordered[:, cut - 1] + ordered[:, cut]) / 2).transpose(1, 2).contiguous()


def shared_bins(points: Tensor, boundaries: Tensor | None) -> Tensor:
    """Find the buckets of points between fitted boundaries.

    Args:
        points: `[B, H, T, r]`.
        boundaries: `[Hb, r, bins - 1]` with `H` a multiple of `Hb`; consecutive heads share theirs.

    Returns:
        `[B, H, T, r]` int64, `dimension * bins + bin`; a point on a boundary is in the bin above it.

    Raises:
        ValueError: boundaries that do not fit the points, or None (not fitted).
    """
    boundaries = _fitted(points, boundaries)
    bins = boundaries.shape[-1] + 1
    grouped = by_group(points, boundaries.shape[0]).to(boundaries.dtype)  # [B, Hb, G, T, r]
    buckets = torch.zeros_like(grouped, dtype=torch.int64)
    for edge in range(bins - 1):
        buckets += grouped >= boundaries[:, None, None, :, edge]
    buckets += torch.arange(points.shape[3], device=points.device) * bins
    return buckets.flatten(1, 2)


def fixed_bins(points: Tensor, width: int, valid: Tensor | None = None) -> tuple[Tensor, int]:
    """Put points into buckets of `width` each, by rank in each dimension; of equal points the earlier ranks lower.

    Args:
        points: `[B, H, T, r]`, of a whole text.
        width: points per bin, 1 to the length of each text; the last bin may hold fewer.
        valid: `[B, T]` bool, or None; padding has no rank.

    Returns:
        `[B, H, T, r]` int64, `dimension * bins + rank // width`, -1 at padding; and the number of buckets.

    Raises:
        ValueError: `width` out of range.
    """
    length, rank = points.shape[2:]
    _check_width(width, length, valid)
    order = _order(points, valid)
    place = torch.arange(length, device=points.device)[:, None].expand_as(order)
    bins = -(-length // width)
    buckets = torch.empty_like(order).scatter_(2, order, place) // width
    buckets = buckets + torch.arange(rank, device=points.device) * bins
    return clear_padding(buckets, valid), rank * bins


def _fitted(points: Tensor, boundaries: Tensor | None) -> Tensor:
    if boundaries is None:
        raise ValueError("expected fitted boundaries, got None: fit them to training text first (fit_boundaries)")
    heads, rank = points.shape[1], points.shape[3]
    if boundaries.ndim != 3 or heads % boundaries.shape[0] or boundaries.shape[1] != rank:
        raise ValueError(
            f"expected boundaries [H, {rank}, bins - 1] with H a divisor of {heads}, got {tuple(boundaries.shape)}"
        )
    return boundaries


def _check_width(width: int, length: int, valid: Tensor | None) -> None:
    """Raise `ValueError` unless every text fills a bin; texts of padding alone do not count."""
    if valid is not None:
        tokens = valid.sum(-1)
        length = int(tokens.masked_fill(tokens == 0, length).min())
    if not 1 <= width <= length:
        raise ValueError(f"a bin must hold 1 to {length} of {length} tokens, got {width}")


def _order(points: Tensor, valid: Tensor | None) -> Tensor:
    """Sort the tokens by rank in each dimension, `[B, H, T, r]` int64, padding behind all others."""
    last = points if valid is None else points.masked_fill(~valid[:, None, :, None], torch.inf)
    return last.argsort(dim=2, stable=True)


def fixed_bin_pairs(
    query_points: Tensor, key_points: Tensor, width: int, size: int, rows: int, valid: Tensor | None = None
) -> Tensor:
    """Count the pairs of tokens with a common bin for each pair of tiles, once for each dimension: `[B, Hq, nq, nk]`.

    Every pair of every bin adds one to its pair of tiles: `r * T * width` additions, however many bins there are.

    Args:
        query_points: `[B, Hq, T, r]`; key_points: `[B, Hkv, T, r]`, of whole texts.
        width, valid: as in `fixed_bins`.
        size, rows: keys and queries per tile.

    Returns:
        float32. Pairs of the future count too.

    Raises:
        ValueError: `width` out of range, or points that do not fit.
    """
    check_points(query_points, key_points)
    batch, heads, length, _ = query_points.shape
    _check_width(width, length, valid)
    kv_heads, device = key_points.shape[1], key_points.device
    listed, tiles = tile_counts(length, length, size, rows)
    of_query = _tiles_in_bins(query_points, width, torch.arange(length, device=device) // rows, listed, valid)
    of_key = _tiles_in_bins(key_points, width, torch.arange(length, device=device) // size, tiles, valid)
    # The last row and column count the members that are in no tile.
    cell = by_group(of_query, kv_heads)[..., None] * (tiles + 1) + of_key[:, :, None, :, None, :]
    cell = cell.flatten(1, 2).flatten(2)
    count = torch.zeros((batch, heads, (listed + 1) * (tiles + 1)), device=device)
    count.scatter_add_(-1, cell, torch.ones((), device=device).expand_as(cell))
    return count.unflatten(-1, (listed + 1, tiles + 1))[..., :listed, :tiles]


def _tiles_in_bins(points: Tensor, width: int, tile: Tensor, tiles: int, valid: Tensor | None) -> Tensor:
    """Find the tile of each member of each bin, `[B, H, r * bins, width]` int64; `tiles` for no member."""
    order = _order(points, valid)
    member = tile.clamp(max=tiles)[order]
    if valid is not None:
        member = member.masked_fill(~valid[:, None, :, None].expand_as(order).gather(2, order), tiles)
    member = torch.nn.functional.pad(member.transpose(2, 3), (0, -points.shape[2] % width), value=tiles)
    return member.unflatten(3, (-1, width)).flatten(2, 3)
