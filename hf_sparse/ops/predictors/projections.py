"""Check and average projected queries and keys, the points that a predictor compares."""

import torch
from torch import Tensor

from hf_sparse.ops.tiles.tiles import tile_counts


def check_points(query: Tensor, key: Tensor) -> None:
    """Raise `ValueError` unless the points are `[B, Hq, Tq, r]` and `[B, Hkv, Tk, r]`."""
    got = f"queries {tuple(query.shape)} and keys {tuple(key.shape)}"
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0]:
        raise ValueError(f"expected points of queries [B, Hq, Tq, r] and keys [B, Hkv, Tk, r], got {got}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"queries and keys must be projected to the same rank, got {got}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the KV heads, got {got}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"queries are the last of the keys: expected Tq <= Tk, got {got}")


def by_group(query: Tensor, kv_heads: int) -> Tensor:
    """Split the query heads by KV head: `[B, Hq, ...]` to `[B, Hkv, Hq / Hkv, ...]`."""
    return query.unflatten(1, (kv_heads, -1))


def tile_of_query(queries: int, keys: int, size: int, lag: int, device: torch.device) -> Tensor:
    """Find the tile that each query describes, `[Tq]` int64, as a row of the listed query tiles.

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


def tile_means(points: Tensor, exists: Tensor, rows: int) -> Tensor:
    """Average the points of each tile, `[B, H, tiles, r]` in the dtype of `points`; 0 for a tile without any.

    Args:
        points: `[B, H, tiles * rows, r]`.
        exists: `[B, tiles * rows]` bool, False for a point that does not count.
        rows: points per tile.
    """
    batch, heads, length, rank = points.shape
    tile, tiles = torch.arange(length, device=points.device) // rows, length // rows
    count = points.new_zeros((batch, 1, tiles)).index_add_(2, tile, exists[:, None].to(points.dtype))
    # A point that does not count may be NaN, which a weight of 0 would not remove.
    counted = points.masked_fill(~exists[:, None, :, None], 0.0)
    total = points.new_zeros((batch, heads, tiles, rank)).index_add_(2, tile, counted)
    return total / count.clamp(min=1)[..., None]
