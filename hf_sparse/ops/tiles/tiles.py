"""Describe a graph of tiles: which tiles of keys each tile of queries attends to.

Positions are cut into tiles of `size` keys, and of `rows` queries, which is `size` or a divisor of it; the last tile
may be partial. Queries are counted by their position among the keys: with `Tq < Tk` they are the last ones, and only
their tiles are listed, `nq` of them. A query tile lies in one tile of keys, its own; see `own_tiles`.

A list holds `m` of `nk` tiles, so storing, uniting and attending cost `nq * m`. Lists are filled up with -1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.tiles.allowed import allowed_edges, positions_of


def tile_counts(queries: int, keys: int, size: int, rows: int | None = None) -> tuple[int, int]:
    """Count the tiles of queries that are listed and the tiles of keys: `(nq, nk)`.

    Args:
        queries, keys: `Tq` and `Tk`; the queries are the last ones.
        size: keys per tile, at least 1.
        rows: queries per tile, a divisor of `size`, which is the default.

    Raises:
        ValueError: `size` below 1, `rows` that does not divide it, or more queries than keys.

    >>> tile_counts(5, 70, 16)  # positions 65 to 69 are in the last of 5 tiles
    (1, 5)
    >>> tile_counts(5, 70, 16, rows=2)  # 65, 66 and 67, 68 and 69
    (3, 5)
    """
    rows = _rows(size, rows)
    if queries > keys:
        raise ValueError(f"queries are the last of the keys: expected Tq <= Tk, got Tq={queries}, Tk={keys}")
    return (-(-keys // rows) - (keys - queries) // rows if queries else 0), -(-keys // size)


def own_tiles(
    listed: int,
    keys: int,
    size: int,
    rows: int | None = None,
    *,
    first_query: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Find the tile of keys in which each tile of queries lies, `[nq]` or `[B, nq]` int64.

    Args:
        listed, keys: `nq` and `Tk`.
        size, rows: as in `tile_counts`.
        first_query: `[B]` int64, position of the first query of each text; the last `listed` tiles by default.
        device: device of the result, if `first_query` is not given.

    >>> own_tiles(3, 70, 16, rows=4).tolist()  # those that begin at 60, 64 and 68
    [3, 4, 4]
    """
    rows = _rows(size, rows)
    if first_query is not None:
        number = first_query[:, None] // rows + torch.arange(listed, device=first_query.device)
        return (number * rows // size).clamp(max=-(-keys // size) - 1)
    total = -(-keys // rows)
    return torch.arange(total - listed, total, device=device) * rows // size


def _rows(size: int, rows: int | None) -> int:
    """Check the sizes of tiles, and return the queries per tile."""
    if size < 1:
        raise ValueError(f"a tile must hold at least 1 position, got size={size}")
    if rows is None:
        return size
    if rows < 1 or size % rows:
        raise ValueError(f"a tile of queries must divide a tile of {size} keys, got rows={rows}")
    return rows


@dataclass(frozen=True)
class Tiles:
    """List the key tiles that each query tile attends to.

    Inside a listed tile every allowed key is attended; see `allowed_edges`. A list may name tiles without allowed keys.

    Attributes:
        index: `[B, H, nq, m]` int64, ascending and without duplicates, -1 behind the last. `H` is the number of query
            heads, or that of KV heads if the heads of a group share their graph, or 1.
        size: keys per tile.
        query_size: queries per tile, a divisor of `size`, which is the default.
        checked: whether the lists are known to be of the described form and to name tiles that exist. Otherwise
            attention over them looks, for which it waits for the device.
        lengths: `[B, H, nq]` int32, how many tiles each list has, where that is known already.
    """

    index: Tensor
    size: int
    query_size: int | None = None
    checked: bool = False
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        _rows(self.size, self.query_size)
        if self.index.ndim != 4 or self.index.dtype != torch.int64:
            got = f"{tuple(self.index.shape)} {self.index.dtype}"
            raise ValueError(f"expected a tile index [B, H, nq, m] int64, got {got}")
        lengths = self.lengths
        if lengths is not None and (lengths.shape != self.index.shape[:3] or lengths.dtype != torch.int32):
            expected, got = tuple(self.index.shape[:3]), f"{tuple(lengths.shape)} {lengths.dtype}"
            raise ValueError(f"expected a length for each list, {expected} int32, got {got}")

    @property
    def rows(self) -> int:
        """Return the queries per tile."""
        return _rows(self.size, self.query_size)

    @classmethod
    def of_mask(cls, mask: Tensor, size: int, rows: int | None = None) -> "Tiles":
        """List the tiles that are True in `mask`, `[B, H, nq, nk]` bool; `size` and `rows` as in `tile_counts`."""
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(f"expected a tile mask [B, H, nq, nk] bool, got {tuple(mask.shape)} {mask.dtype}")
        tile = torch.arange(mask.shape[-1], device=mask.device)
        return cls(_compact(torch.where(mask, tile, -1)), size, rows)

    @property
    def counts(self) -> Tensor:
        """Count the listed tiles per query tile, `[B, H, nq]` int64."""
        return (self.index >= 0).sum(-1)

    def mask(self, tiles: int) -> Tensor:
        """Mark the listed tiles, `[B, H, nq, nk]` bool, for `tiles` = `nk` tiles of keys.

        Raises:
            ValueError: a listed tile does not exist.
        """
        highest = int(self.index.max()) if self.index.numel() else -1
        if highest >= tiles:
            raise ValueError(f"expected a graph of key tiles 0 to {tiles - 1}, got tile {highest}")
        listed = self.index.new_zeros((*self.index.shape[:3], tiles + 1), dtype=torch.bool)
        return listed.scatter_(-1, self.index.masked_fill(self.index < 0, tiles), True)[..., :tiles]

    def union(self, other: "Tiles") -> "Tiles":
        """Unite the lists of two graphs, each tile once; `B` and `H` may be 1 in one of the two.

        Raises:
            ValueError: tiles of different sizes, or of graphs that do not broadcast.
        """
        if (self.size, self.rows) != (other.size, other.rows) or self.index.shape[2] != other.index.shape[2]:
            raise ValueError(
                f"expected graphs of equal tiles, got {self.index.shape[2]} query tiles of {self.rows} by {self.size} "
                f"positions and {other.index.shape[2]} of {other.rows} by {other.size}"
            )
        lead = torch.broadcast_shapes(self.index.shape[:3], other.index.shape[:3])
        both = torch.cat([part.index.expand(*lead, part.index.shape[3]) for part in (self, other)], -1)
        return Tiles(each_once(both), self.size, self.rows)

    def edges(self, queries: int, keys: int, *, causal: bool, rows: Tensor | None = None) -> Tensor:
        """List the allowed pairs inside listed tiles, `[B, H, Tq, Tk]` bool: for analysis and short texts.

        Args:
            queries, keys: `Tq` and `Tk`.
            causal: as in `allowed_edges`.
            rows: `[R]` int64, the queries wanted, counted from 0 to `Tq - 1`; all by default.

        Raises:
            ValueError: the graph has another number of query tiles.
        """
        listed, total = tile_counts(queries, keys, self.size, self.rows)
        if listed != self.index.shape[2]:
            raise ValueError(
                f"{queries} queries of {keys} keys are {listed} tiles of {self.rows}, got a graph of "
                f"{self.index.shape[2]} query tiles"
            )
        position = positions_of(queries, keys, rows, device=self.index.device)
        row = position // self.rows - (keys - queries) // self.rows
        column = torch.arange(keys, device=self.index.device) // self.size
        return self.mask(total)[:, :, row][..., column] & allowed_edges(position, keys, causal=causal)


def window_and_global(
    queries: int,
    keys: int,
    size: int,
    *,
    rows: int | None = None,
    window: int,
    global_tokens: int = 0,
    causal: bool,
    first_query: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tiles:
    """List the tiles that hold a key in the window of some query of the tile, or one of the first tokens of the text.

    Args:
        queries, keys: `Tq` and `Tk`.
        size, rows: as in `tile_counts`.
        window: tokens, at least 0. A causal query sees the last `window` keys, its own included; without causal order
            those from `t - window // 2` to `t - window // 2 + window - 1`, as in `sparsek_attention`.
        global_tokens: number of first tokens that every query attends to, at least 0.
        causal: as in `allowed_edges`.
        first_query: `[B]` int64, position of the first query of each text, a multiple of `rows` where there are more
            queries than one; by default the queries are the last positions.
        device: device of the result.

    Returns:
        Tiles with an index `[B, 1, nq, m]`; `B` is 1 without `first_query`. A global token is one that all attend to;
        that it attends to all is not said here, because one row of `nk` tiles would make every list that long.

    Raises:
        ValueError: a negative `window` or `global_tokens`, or see `tile_counts`.
    """
    if window < 0 or global_tokens < 0:
        raise ValueError(f"window and global_tokens must be at least 0, got {window} and {global_tokens}")
    rows = _rows(size, rows)
    if first_query is None:
        listed, total = tile_counts(queries, keys, size, rows)
        number = torch.arange(listed, device=device)[None] + (keys - queries) // rows
    else:
        listed, total = -(-queries // rows), -(-keys // size)
        number = torch.arange(listed, device=device) + first_query[:, None] // rows
    begin = (number * rows)[:, None, :, None]
    left, right = (window - 1, 0) if causal else (window // 2, window - 1 - window // 2)
    # No further than there are tiles, however wide the window is.
    lowest = ((begin - left) // size).clamp(min=0)
    highest = ((begin + rows - 1 + right) // size).clamp(max=total - 1)
    width = min(total, -(-(left + right + rows - 1) // size) + 1) if window else 0
    window_tiles = lowest + torch.arange(width, device=device)
    window_tiles = window_tiles.masked_fill(window_tiles > highest, -1)
    first = torch.arange(-(-min(global_tokens, keys) // size), device=device).expand(*window_tiles.shape[:3], -1)
    return Tiles(each_once(torch.cat([window_tiles, first], -1)), size, rows)


def near_edges(position: Tensor, keys: int, *, window: int, global_tokens: int, causal: bool) -> Tensor:
    """Mark the keys in the window of each query and the first ones, `[B, 1, R, Tk]` bool; `B` is 1 for positions `[R]`.

    Args:
        position: `[R]` or `[B, R]` int64, position of each query among the keys.
        keys: `Tk`.
        window, global_tokens, causal: as in `window_and_global`. Keys of the future may be marked.
    """
    key = torch.arange(keys, device=position.device)
    begin = position[..., None] - (window - 1 if causal else window // 2)
    marked = (key >= begin) & (key < begin + window) | (key < global_tokens)
    return marked[None, None] if position.ndim == 1 else marked[:, None]


def joined(parts: Sequence[Tiles]) -> Tiles:
    """Join the lists of consecutive query tiles, of graphs with equal tiles, `B` and `H`."""
    width = max(part.index.shape[3] for part in parts)
    lists = [F.pad(part.index, (0, width - part.index.shape[3]), value=-1) for part in parts]
    return Tiles(torch.cat(lists, 2), parts[0].size, parts[0].rows)


def each_once(tile: Tensor) -> Tensor:
    """Sort lists `[..., m]` and drop duplicates; -1 stands at the end, and `m` shrinks to what the longest needs."""
    ordered = tile.sort(dim=-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return _compact(ordered.masked_fill(again, -1))


def _compact(tile: Tensor) -> Tensor:
    """Sort `[..., m]` ascending with every -1 at the end, and drop the columns that hold nothing else."""
    last = torch.iinfo(tile.dtype).max
    ordered = tile.masked_fill(tile < 0, last).sort(dim=-1).values
    exists = ordered < last
    width = int(exists.sum(-1).amax()) if exists.numel() else 0
    return ordered.masked_fill(~exists, -1)[..., :width].contiguous()
