"""Mark the pairs of a query and a key that may be joined at all: no padding and, in a causal model, no future."""

import torch
from torch import Tensor


def positions_of(
    queries: int, keys: int, rows: Tensor | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Find the positions among the keys, `[R]` int64, of the queries `rows` (`[R]` int64, from 0; all by default)."""
    offset = keys - queries
    return torch.arange(offset, keys, device=device) if rows is None else rows.to(device) + offset


def allowed_edges(position: Tensor, keys: int, *, causal: bool, valid: Tensor | None = None) -> Tensor:
    """Mark the allowed pairs, `[B, 1, R, Tk]` bool; `B` is 1 where all texts have the same.

    Args:
        position: `[R]` or `[B, R]` int64, position of each query among the keys.
        keys: `Tk`.
        causal: whether a query sees the keys up to its own position, or all of them.
        valid: `[B, Tk]` bool, False where there is padding; for positions `[R]`. A query at padding has no allowed key.

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    index = torch.arange(keys, device=position.device)
    allowed = (index <= position[..., None]) if causal else index.new_ones((*position.shape, keys), dtype=torch.bool)
    allowed = allowed[None, None] if position.ndim == 1 else allowed[:, None]
    if valid is None:
        return allowed
    check_valid(valid, keys)
    return allowed & valid[:, None, None, :] & valid[:, None, position, None]


def allowed_tiles(own: Tensor, tiles: int, *, causal: bool, valid_tiles: Tensor | None = None) -> Tensor:
    """Mark the pairs of tiles with an allowed pair in them, `[B, 1, nq, nk]` bool; `B` is 1 where all texts agree.

    Args:
        own: `[nq]` or `[B, nq]` int64, the tile of keys in which each tile of queries lies, see `own_tiles`.
        tiles: `nk`, see `tile_counts`.
        causal: as in `allowed_edges`.
        valid_tiles: `[B, nk]` bool, False for a tile of padding only; see `tiles_of_valid`. Queries in such a tile are
            padding too; others that are padding count as if they were none.
    """
    return allowed_edges(own, tiles, causal=causal, valid=valid_tiles)


def tiles_of_valid(valid: Tensor, size: int) -> Tensor:
    """Mark the tiles that hold anything but padding, `[B, nk]` bool from `[B, Tk]`."""
    return torch.nn.functional.pad(valid, (0, -valid.shape[-1] % size)).unflatten(-1, (-1, size)).any(-1)


def check_valid(valid: Tensor, keys: int) -> None:
    """Raise `ValueError` unless `valid` is `[B, keys]` bool."""
    if valid.ndim != 2 or valid.shape[1] != keys or valid.dtype != torch.bool:
        raise ValueError(f"expected valid [B, {keys}] bool, got {tuple(valid.shape)} {valid.dtype}")
