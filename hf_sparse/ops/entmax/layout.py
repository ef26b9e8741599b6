"""Fold heads and positions into independent pieces of work (jobs).

A job is one tile of queries of one list of tiles. It has `share * rows` queries: those of `share` query heads, which
have the list in common, at `rows` consecutive positions. Tiles of queries and of keys may differ in size. Jobs are
numbered by batch, list and query tile.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.entmax.inputs import Inputs
from hf_sparse.ops.tiles.tiles import Tiles, own_tiles, tile_counts


@dataclass(frozen=True)
class Layout:
    """Describe the jobs of a call.

    Attributes:
        heads: lists of tiles per text, as many as there are query heads, or KV heads.
        size, query_size: positions per tile of keys and of queries.
        first_query: `[B]` int64, position of the first query of each text, where its first tile begins; by default the
            queries stand at the last positions.
    """

    batch: int
    query_heads: int
    kv_heads: int
    heads: int
    queries: int
    keys: int
    size: int
    query_size: int
    first_query: Tensor | None = None

    @property
    def share(self) -> int:
        return self.query_heads // self.heads

    @property
    def query_tiles(self) -> int:
        if self.first_query is not None:
            return -(-self.queries // self.query_size)
        return tile_counts(self.queries, self.keys, self.size, self.query_size)[0]

    @property
    def key_tiles(self) -> int:
        return -(-self.keys // self.size)

    @property
    def jobs(self) -> int:
        return self.batch * self.heads * self.query_tiles

    @property
    def rows(self) -> int:
        """Return the queries per tile; a single tile has no more than the call has queries (one, in decoding)."""
        return self.query_size if self.query_tiles > 1 else self.queries

    @property
    def lead(self) -> int:
        """Count the rows of the first tile of queries that lie before the first query."""
        if self.first_query is not None or self.query_tiles <= 1:
            return 0
        return (self.keys - self.queries) % self.query_size

    def first_of(self, jobs: Tensor) -> int | Tensor:
        """Find the position of the first query: a number, or `[n, 1]` int64 of the text of each job."""
        return self.keys - self.queries if self.first_query is None else self.first_query[self.batch_of(jobs), None]

    def own_tiles(self, device: torch.device) -> Tensor:
        """Find the own tiles, `[nq]` or `[B, nq]` int64, see `hf_sparse.ops.tiles.tiles.own_tiles`."""
        return own_tiles(
            self.query_tiles, self.keys, self.size, self.query_size, first_query=self.first_query, device=device
        )

    def positions(self, jobs: Tensor) -> Tensor:
        """Find where the queries of a job stand among the keys, `[n]` -> `[n, rows]` int64; some may not exist."""
        step = torch.arange(self.rows, device=jobs.device) - self.lead
        return self.first_of(jobs) + (jobs % self.query_tiles)[:, None] * self.rows + step

    def list_of(self, jobs: Tensor) -> Tensor:
        return jobs // self.query_tiles % self.heads

    def batch_of(self, jobs: Tensor) -> Tensor:
        return jobs // (self.query_tiles * self.heads)

    def kv_of(self, jobs: Tensor) -> Tensor:
        """Find the index of each job's KV head in a flat `[B * Hkv]`."""
        return self.batch_of(jobs) * self.kv_heads + self.list_of(jobs) // (self.heads // self.kv_heads)

    def fold_queries(self, tensor: Tensor) -> Tensor:
        """Fold `[B, Hq, Tq, X]` into `[jobs, share * rows, X]`, with zeros where there is no query."""
        tensor = F.pad(tensor, (0, 0, self.lead, self.query_tiles * self.rows - self.lead - self.queries))
        split = tensor.reshape(self.batch, self.heads, self.share, self.query_tiles, self.rows, tensor.shape[-1])
        return split.transpose(2, 3).reshape(self.jobs, self.share * self.rows, tensor.shape[-1])

    def unfold_queries(self, folded: Tensor) -> Tensor:
        """Unfold `[jobs, share * rows, X]` into `[B, Hq, Tq, X]`."""
        split = folded.view(self.batch, self.heads, self.query_tiles, self.share, self.rows, folded.shape[-1])
        rows = split.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return rows[:, :, self.lead : self.lead + self.queries]

    def fold_keys(self, tensor: Tensor) -> Tensor:
        """Fold `[B, Hkv, Tk, X]` into `[B * Hkv * nk, size, X]`, padded with zeros."""
        tensor = F.pad(tensor, (0, 0, 0, self.key_tiles * self.size - self.keys))
        return tensor.unflatten(2, (self.key_tiles, self.size)).flatten(0, 2)

    def per_head(self, table: Tensor, jobs: Tensor) -> Tensor:
        """Look up a number per query head, `[Hq]`, for each job: `[n, share, 1, 1]`."""
        return table.view(self.heads, self.share)[self.list_of(jobs)][..., None, None]


def layout_of(inputs: Inputs, heads: int, size: int, query_size: int) -> Layout:
    """Make the layout of `heads` lists of tiles."""
    (batch, query_heads, queries, _), (_, kv_heads, keys, _) = inputs.query.shape, inputs.key.shape
    return Layout(batch, query_heads, kv_heads, heads, queries, keys, size, query_size, inputs.first_query)


def listed_layout(tiles: Tiles, inputs: Inputs) -> tuple[Layout, Tiles]:
    """Make the layout for `tiles`, and expand these over the batch, and over KV heads where all heads share one list.

    Raises:
        ValueError: lists that are not of these queries and keys, or, unless they were checked, lists that are not
            ascending or have other lengths than they say.
    """
    index = tiles.index
    heads = inputs.key.shape[1] if index.shape[1] == 1 else index.shape[1]
    layout = layout_of(inputs, heads, tiles.size, tiles.rows)
    if index.shape[0] not in (1, layout.batch) or heads not in (layout.query_heads, layout.kv_heads):
        heads_known = f"H of 1, {layout.kv_heads} or {layout.query_heads}"
        raise ValueError(
            f"expected tiles [B, H, nq, m] with B = {layout.batch} and {heads_known}, got {tuple(index.shape)}"
        )
    if index.shape[2] != layout.query_tiles:
        raise ValueError(
            f"{layout.queries} queries of {layout.keys} keys are {layout.query_tiles} tiles of {tiles.rows}, "
            f"got lists for {index.shape[2]}"
        )
    if index.numel() and not tiles.checked:
        low, high = map(int, index.aminmax())
        if low < -1 or high >= layout.key_tiles:
            raise ValueError(f"expected tiles 0 to {layout.key_tiles - 1}, or -1 for none, got {low} to {high}")
        follows, ends = index[..., 1:] > index[..., :-1], index[..., 1:] < 0
        if not bool((follows & (index[..., :-1] >= 0) | ends).all()):
            raise ValueError("each list of tiles must be ascending, without duplicates, and with every -1 at its end")
        if tiles.lengths is not None and not torch.equal(tiles.lengths, tiles.counts.int()):
            raise ValueError("the lengths of tiles differ from the numbers of tiles that the lists name")
    lengths = None if tiles.lengths is None else tiles.lengths.expand(layout.batch, heads, -1)
    return layout, Tiles(index.expand(layout.batch, heads, -1, -1), tiles.size, tiles.rows, tiles.checked, lengths)
