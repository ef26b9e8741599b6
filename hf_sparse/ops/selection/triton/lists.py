"""List the keys that a query reaches, as two integers per key and one list per tile of queries.

Scores are frozen and thresholds only rise, so every key is attended on one contiguous interval of positions,

    key j is attended by the query at position p  iff  begin[j] <= p < until[j],

causal or not, in the window, selected or a sink. Kernels need no other mask. What is left is to say where to look for
the keys of a tile: in the tile's list, and in the keys around it.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hf_sparse.ops.selection.triton.lists_kernels import in_list_order, intervals, leaving
from hf_sparse.ops.selection.triton.scan import Selection
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty

# Before and after every position; their difference fits into int32.
ALWAYS = -(1 << 29)
NEVER_ENDS = 1 << 29
_KEYS = 256  # per program that looks for intervals
_ENTRIES = 1024  # entries of lists per program that reads in their order


class Tables(NamedTuple):
    """Hold the intervals and lists of keys that the kernels read.

    A query at position p finds its keys in the list of its tile (the first `sinks` keys of the row, then `lists`),
    among the tile's `leavers`, and among the keys from `p - left` to `p + right`. Keys of the list do not stand in that
    range, except those with `begin = ALWAYS`, which are skipped there.

    Attributes:
        begin: `[B, Hkv, Tk]` int32, or `None` for `begin[j] = j`, which is causal order.
        until: `[B, Hkv, Tk]` int32; 0 for padding, which no query attends to.
        lists: `[B, Hkv, n_tiles, W]` int32 or int64, keys in the order of their scores, best first, -1 for none.
        tile: queries that share a list.
        left, right: the window of the query at position p is `p - left` to `p + right`; gates are 1 there.
        sinks: number of sinks of every row, from `first` on, in front of its lists.
        first: `[B]` int64, the first key of each row that is no padding; `None` for 0.
        scores, ends: of soft gates in causal order, `scores` float32 and `until` in the order of `lists`; 0 is the end
            of a key that is no candidate.
        leavers: `[B, Hkv, n_tiles, tile]` int32, in causal order, see `leavers`.
        bounds: `[B, Hkv, n_tiles, 2, tile]` int32, of hard gates in causal order, for each query: how many keys of the
            list it sees, which are the first ones, and how many leavers stand before its window; `None` if kernels have
            to count them.
    """

    begin: Tensor | None
    until: Tensor
    lists: Tensor
    tile: int
    left: int
    right: int
    sinks: int
    first: Tensor | None
    scores: Tensor | None = None
    ends: Tensor | None = None
    leavers: Tensor | None = None
    bounds: Tensor | None = None


def causal_tables(
    rank: Tensor,
    floor: Tensor,
    tau: Tensor | None,
    lists: Tensor,
    scores: Tensor,
    origin: Tensor | None,
    first: Tensor | None,
    *,
    window: int,
    sinks: int,
    tile: int,
) -> tuple[Tables, Tensor | None]:
    """Make the tables of causal attention from a scan of scores with a list per `tile` queries.

    Args:
        rank, floor, tau, lists: of the scan, contiguous; tau float32, `None` for hard gates.
        scores: `[B, Hkv, Tk]` float32, contiguous, without a gradient.
        origin: `[B * Hkv]` float32, what was subtracted from the scores of a row before tau was solved; `None` for 0.
        first: see `Tables`.

    Returns:
        The tables and, for soft gates, the scores that tau is compared with, infinite for sinks and padding.
    """
    (batch, heads, keys), queries, device = scores.shape, floor.shape[-1], scores.device
    soft = tau is not None
    if lists.dtype == torch.int64:  # of the plain scan, which fills short lists with keys that are no candidates
        least = sinks if first is None else first[:, None, None, None] + sinks
        lists = lists.where((lists >= least) & (lists < keys), -1).to(torch.int32)
    until = empty(scores.shape, torch.int32, device)
    shifted = empty(scores.shape, torch.float32, device) if soft else None
    launch(intervals, (triton.cdiv(keys, _KEYS), batch * heads))(
        rank, floor, scores if soft else None, origin, tau, first, until, shifted, keys, queries, heads, window, sinks,
        queries.bit_length(), SOFT=soft, BLOCK=_KEYS, num_warps=4,
    )  # fmt: skip
    tables = Tables(None, until, lists, tile, window - 1, 0, sinks, first)
    tables = tables._replace(leavers=leavers(tables, queries, tile))
    if shifted is None:
        return tables, None
    size = lists.shape[-2] * lists.shape[-1]
    of_lists, ends = empty(lists.shape, torch.float32, device), empty(lists.shape, torch.int32, device)
    launch(in_list_order, (triton.cdiv(size, _ENTRIES), batch * heads))(
        lists, shifted, until, of_lists, ends, size, keys, BLOCK=_ENTRIES, num_warps=4
    )
    return tables._replace(scores=of_lists, ends=ends), shifted


def selection_tables(
    selection: Selection, queries: int, first: Tensor | None, *, window: int, sinks: int, tile: int
) -> Tables:
    """Make the tables of causal attention with hard gates.

    Args:
        selection: of scores `[B, Hkv, Tk]`, with a list per `tile` of the `queries`.
        first: see `Tables`.
    """
    tables = Tables(None, selection.until, selection.lists, tile, window - 1, 0, sinks, first)
    found = leavers(tables, queries, tile) if selection.leavers is None else selection.leavers
    return tables._replace(leavers=found, bounds=selection.bounds)


def leavers(tables: Tables, queries: int, tile: int) -> Tensor:
    """Find the keys that leave the window between the first and last query of a tile and are attended after that.

    In causal order. Of long sequences few keys are selected, so these are few of those that leave.

    Returns:
        `[B, Hkv, n_tiles, tile]` int32, in rising order, -1 after the last; of tiles of `tile` queries.
    """
    batch, heads, keys = tables.until.shape
    tiles = triton.cdiv(queries, tile)
    found = empty((batch, heads, tiles, tile), torch.int32, tables.until.device)
    launch(leaving, (tiles, batch * heads))(
        tables.until, tables.first, found, keys, queries, heads, tiles, tile, tables.left, tables.sinks,
        TILE=triton.next_power_of_2(tile), num_warps=4,
    )  # fmt: skip
    return found


def bidirectional_tables(gates: Tensor, first: Tensor, *, window: int, width: int) -> Tables:
    """Make the tables of an encoder.

    Args:
        gates: `[B, Hkv, T]`; keys with a gate above 0, sinks included, are shared by all queries of the row.
        first: see `Tables`.
        window: as in `sparsek_attention`.
        width: no row has more shared keys than this.
    """
    length = gates.shape[-1]
    left, right = window // 2, window - 1 - window // 2
    index = torch.arange(length, device=gates.device)
    shared = gates > 0
    begin = (index - right).expand_as(gates).masked_fill(shared, ALWAYS).to(torch.int32)
    until = (index + left + 1).masked_fill(index < first[:, None, None], 0)
    until = until.expand_as(gates).masked_fill(shared, NEVER_ENDS).to(torch.int32)
    best = gates.sort(dim=-1, descending=True, stable=True)
    lists = best.indices[..., :width].masked_fill(best.values[..., :width] <= 0, -1)
    return Tables(begin, until, lists.unsqueeze(-2).contiguous(), max(1, length), left, right, 0, first)


def by_lifetime(tables: Tables) -> Tensor:
    """Sort all keys, `[B, Hkv, Tk]` int64: the longest attended first, and of about the same time the earlier ones.

    Consecutive keys of this order are attended by about the same queries, and the longest work comes first.
    """
    begin = tables.begin
    if begin is None:
        begin = torch.arange(tables.until.shape[-1], device=tables.until.device, dtype=torch.int32)
    halves = (tables.until - begin).clamp(min=1).to(torch.float32).log2().mul(2).to(torch.uint8)
    return halves.argsort(dim=-1, descending=True, stable=True)
