"""Projected queries and keys, the points that a predictor compares, and what stands for a tile of them."""

import torch
from torch import Tensor

from hf_sparse.ops.graphs.allowed import check_valid
from hf_sparse.ops.graphs.tiles import tile_counts


def check_points(query: Tensor, key: Tensor, valid: Tensor | None = None) -> None:
    """Raise `ValueError` unless the points are `[B, Hq, Tq, r]` and `[B, Hkv, Tk, r]`, and `valid` `[B, Tk]` bool."""
    got = f"queries {tuple(query.shape)} and keys {tuple(key.shape)}"
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0]:
        raise ValueError(f"expected points of queries [B, Hq, Tq, r] and keys [B, Hkv, Tk, r], got {got}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"queries and keys must be projected to the same rank, got {got}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the KV heads, got {got}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"queries are the last of the keys: expected Tq <= Tk, got {got}")
    if valid is not None:
        check_valid(valid, key.shape[2])


def by_group(query: Tensor, kv_heads: int) -> Tensor:
    """`[B, Hq, ...]` -> `[B, Hkv, Hq / Hkv, ...]`."""
    return query.unflatten(1, (kv_heads, -1))


def tile_of_query(queries: int, keys: int, size: int, lag: int, device: torch.device) -> Tensor:
    """`[Tq]` int64: the row, among the listed query tiles, of the tile that each query describes.

    A tile of `size` queries is described by as many queries that begin `lag` positions before it. With `lag = 0` these
    are its own, as in the released code; its first query then depends on those after it. `lag = size - 1` is the least
    for which nothing that a causal query attends to depends on later tokens. The last queries then describe a tile that
    is not there yet, which is numbered `nq`.
    """
    listed, total = tile_counts(queries, keys, size)
    if not 0 <= lag < size:
        raise ValueError(f"lag must be from 0 to {size - 1} for tiles of {size}, got {lag}")
    position = torch.arange(keys - queries, keys, device=device)
    return (position + lag) // size - (total - listed)


def tile_means(points: Tensor, tile: Tensor, tiles: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean point of each tile, and whether the tile has a point.

    Args:
        points: `[B, H, T, r]`; the last `T` of `Tk` positions.
        tile: `[T]` int64, the tile of each point; points of tile `tiles` and above are left out.
        tiles: how many tiles.
        valid: `[B, Tk]` bool, or None.

    Returns:
        `[B, H, tiles, r]` in the dtype of `points`, 0 for an empty tile, and `[B, 1, tiles]` bool.
    """
    batch, heads, length, rank = points.shape
    real = points.new_ones((batch, length), dtype=torch.bool) if valid is None else valid[:, valid.shape[1] - length :]
    tile = tile.clamp(max=tiles)
    count = points.new_zeros((batch, 1, tiles + 1)).index_add_(2, tile, real[:, None].to(points.dtype))[..., :tiles]
    # Padding may hold NaN, which a weight of 0 would not remove.
    kept = points.masked_fill(~real[:, None, :, None], 0.0)
    total = points.new_zeros((batch, heads, tiles + 1, rank)).index_add_(2, tile, kept)[:, :, :tiles]
    return total / count.clamp(min=1)[..., None], count > 0
