"""A graph of tiles: which tiles of keys each tile of queries attends to.

Positions are cut into tiles of `size`, the last of which may be partial. Queries are counted by their position among
the keys: with `Tq < Tk` they are the last ones, and only their tiles are listed. With `nq` listed tiles of queries and
`nk` tiles of keys, row `i` of a graph is tile `nk - nq + i`.

A list holds `m` of `nk` tiles, so storing, uniting and attending cost `nq * m`. Lists are filled up with -1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.ops.graphs.allowed import allowed_edges, positions_of


def tile_counts(queries: int, keys: int, size: int) -> tuple[int, int]:
    """`(nq, nk)`: how many tiles of queries are listed, and how many tiles of keys there are.

    Args:
        queries, keys: `Tq` and `Tk`; the queries are the last ones.
        size: positions per tile, at least 1.

    Raises:
        ValueError: `size` below 1, or more queries than keys.

    >>> tile_counts(5, 70, 16)  # positions 65 to 69 are in the last of 5 tiles
    (1, 5)
    """
    if size < 1:
        raise ValueError(f"a tile must hold at least 1 position, got size={size}")
    if queries > keys:
        raise ValueError(f"queries are the last of the keys: expected Tq <= Tk, got Tq={queries}, Tk={keys}")
    total = -(-keys // size)
    return (total - (keys - queries) // size if queries else 0), total


@dataclass(frozen=True)
class Tiles:
    """The key tiles that each query tile attends to.

    Inside a listed tile every allowed key is attended; see `allowed_edges`. A list may name tiles without allowed keys.

    Attributes:
        index: `[B, H, nq, m]` int64, ascending and without duplicates, -1 behind the last. `H` is the number of query
            heads, or that of KV heads if the heads of a group share their graph, or 1.
        size: positions per tile.
    """

    index: Tensor
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a tile must hold at least 1 position, got size={self.size}")
        if self.index.ndim != 4 or self.index.dtype != torch.int64:
            got = f"{tuple(self.index.shape)} {self.index.dtype}"
            raise ValueError(f"expected a tile index [B, H, nq, m] int64, got {got}")

    @classmethod
    def of_mask(cls, mask: Tensor, size: int) -> "Tiles":
        """Lists of the tiles that are True in `mask`, `[B, H, nq, nk]` bool."""
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(f"expected a tile mask [B, H, nq, nk] bool, got {tuple(mask.shape)} {mask.dtype}")
        tile = torch.arange(mask.shape[-1], device=mask.device)
        return cls(_compact(torch.where(mask, tile, -1)), size)

    @property
    def counts(self) -> Tensor:
        """`[B, H, nq]` int64, listed tiles per query tile."""
        return (self.index >= 0).sum(-1)

    def mask(self, tiles: int) -> Tensor:
        """`[B, H, nq, nk]` bool, for `tiles` = `nk` tiles of keys.

        Raises:
            ValueError: a listed tile does not exist, or there are more query tiles than key tiles.
        """
        highest = int(self.index.max()) if self.index.numel() else -1
        if highest >= tiles or self.index.shape[2] > tiles:
            raise ValueError(
                f"the graph lists key tile {highest} and {self.index.shape[2]} query tiles, but there are {tiles} tiles"
            )
        listed = self.index.new_zeros((*self.index.shape[:3], tiles + 1), dtype=torch.bool)
        return listed.scatter_(-1, self.index.masked_fill(self.index < 0, tiles), True)[..., :tiles]

    def union(self, other: "Tiles") -> "Tiles":
        """The tiles that are in either list, each once; `B` and `H` may be 1 in one of the two.

        Raises:
            ValueError: tiles of different sizes, or of graphs that do not broadcast.
        """
        if self.size != other.size or self.index.shape[2] != other.index.shape[2]:
            raise ValueError(
                f"expected graphs of equal tiles, got {self.index.shape[2]} query tiles of {self.size} positions "
                f"and {other.index.shape[2]} of {other.size}"
            )
        lead = torch.broadcast_shapes(self.index.shape[:3], other.index.shape[:3])
        both = torch.cat([part.index.expand(*lead, part.index.shape[3]) for part in (self, other)], -1)
        return Tiles(each_once(both), self.size)

    def edges(
        self, queries: int, keys: int, *, causal: bool, valid: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """The allowed pairs inside listed tiles, `[B, H, Tq, Tk]` bool: for analysis and short texts.

        Args:
            queries, keys: `Tq` and `Tk`.
            causal, valid: as in `allowed_edges`.
            rows: `[R]` int64, the queries wanted, counted from 0 to `Tq - 1`; all by default.

        Raises:
            ValueError: the graph has another number of query tiles.
        """
        listed, total = tile_counts(queries, keys, self.size)
        if listed != self.index.shape[2]:
            raise ValueError(
                f"{queries} queries of {keys} keys are {listed} tiles of {self.size}, got a graph of "
                f"{self.index.shape[2]} query tiles"
            )
        position = positions_of(queries, keys, rows, device=self.index.device)
        row = position // self.size - (total - listed)
        column = torch.arange(keys, device=self.index.device) // self.size
        return self.mask(total)[:, :, row][..., column] & allowed_edges(position, keys, causal=causal, valid=valid)


def window_and_global(
    queries: int,
    keys: int,
    size: int,
    *,
    window: int,
    global_tokens: int = 0,
    causal: bool,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tiles:
    """Tiles that hold a key in the window of some query of the tile, or one of the first tokens of the text.

    Args:
        queries, keys: `Tq` and `Tk`.
        size: positions per tile.
        window: tokens, at least 0. A causal query sees the last `window` keys, its own included; without causal order
            those from `t - window // 2` to `t - window // 2 + window - 1`, as in `sparsek_attention`.
        global_tokens: how many of the first valid tokens every query attends to, at least 0.
        causal, valid: as in `allowed_edges`.
        device: of the result, that of `valid` by default.

    Returns:
        Tiles with an index `[B, 1, nq, m]`; `B` is 1 without `valid`. A global token is one that all attend to; that it
        attends to all is not said here, because one row of `nk` tiles would make every list that long.

    Raises:
        ValueError: a negative `window` or `global_tokens`, or see `tile_counts`.
    """
    if window < 0 or global_tokens < 0:
        raise ValueError(f"window and global_tokens must be at least 0, got {window} and {global_tokens}")
    listed, total = tile_counts(queries, keys, size)
    if device is None and valid is not None:
        device = valid.device
    tile = torch.arange(total - listed, total, device=device)[:, None]
    left, right = (window - 1, 0) if causal else (window // 2, window - 1 - window // 2)
    reach = range(0)
    if window:
        # No further than there are tiles, however wide the window is.
        reach = range(-min(total, -(-left // size)), min(total, (size - 1 + right) // size) + 1)
    near = tile + torch.tensor(list(reach), dtype=torch.int64, device=device)
    near = near.masked_fill((near < 0) | (near >= total), -1)[None, None]
    if valid is None:
        first = torch.arange(-(-min(global_tokens, keys) // size), device=device)[None]
    else:
        token = torch.arange(keys, device=device)
        wanted = valid & (valid.cumsum(-1) <= global_tokens)
        first = torch.where(wanted, token // size, -1).sort(dim=-1, descending=True).values[:, :global_tokens]
    first = first[:, None, None].expand(-1, 1, listed, -1)
    return Tiles(each_once(torch.cat([near.expand(len(first), -1, -1, -1), first], -1)), size)


def each_once(tile: Tensor) -> Tensor:
    """Lists `[..., m]` sorted, without duplicates, -1 at the end, and no longer than the longest needs."""
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
