"""Scan prefixes as `hf_sparse.ops.selection.thresholds` does, on a GPU, in a number of launches that grows as log T.

The best `size` keys of a prefix are an associative function of its parts: those of several neighbouring parts are the
first `size` of their merged lists. So the keys are cut into chunks of a tile each, and

    sort_chunks       sorts each chunk                                                                  1 launch
    merge_groups      merges each list with those before it in its group: of 8 chunks, then of 32 lists
                      that stand for all of a group each, and so on           about log(T / 128) / log(32) launches
    join_groups       joins both into the best keys before each tile; of longer texts first into those before
                      each group                                                   1 launch, and 1 per further level

Merging looks up each key's place in the other lists, which needs no communication between threads, and stops where
that is beyond `size`; nothing waits for the host. The derivation is ours. Hard gates need one launch more:

    evictions         finds when each key leaves the best, and the keys that leave the window and stay; in the launch
                      of `join_groups` where a program there has the whole list of a tile

and soft gates one for each of

    find_origins      chooses what is subtracted from the scores of a row, if anything
    sum_lists         sums the scores of every list up to each entry
    tile_thresholds   solves for tau before each tile
    query_thresholds  solves for floor and tau of all queries, from the list of their tile and its chunk
    raise_thresholds  copies tau, so that rounding never makes it fall

In the backward `free_intervals` finds the queries whose tau moves with a key, `shares` divides the gradient of each
among its free keys, `sum_totals` and `sum_shares` add up those of every key; one launch each.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.selection import thresholds as reference
from hf_sparse.ops.selection.thresholds import Scan, ScanPlan
from hf_sparse.ops.selection.triton.eviction_kernels import evictions, join_and_evict
from hf_sparse.ops.selection.triton.scan_kernels import join_groups, merge_groups, sort_chunks
from hf_sparse.ops.selection.triton.threshold_gradients import free_intervals, shares, sum_shares, sum_totals
from hf_sparse.ops.selection.triton.threshold_kernels import (
    find_origins,
    query_thresholds,
    raise_thresholds,
    sum_lists,
    tile_thresholds,
)
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, zeros

_CHUNK = 128  # keys that are sorted by counting
_SORT_WARPS = 4
_GROUPS = (8, 32)  # chunks that are merged in the first level, lists in every later one
_MERGING = (32, 8)  # entries of a program of one warp, lists in which it looks for them at a time
_JOINING = (512, 128, 4)  # entries of a program, those of the shorter list at a time, most warps
_EVICTING = (16, 1)  # newcomers that are compared with all at a time, and warps
_TAUS = 64  # queries of a program that solves for tau
_LISTS = 32  # per program that solves for their thresholds
_KEYS = 256  # keys or queries per program of the backward
_BLOCKS = 256  # sums of so many programs are added up at a time


class Selection(NamedTuple):
    """Hold when keys are selected, and where a tile finds those that are.

    Attributes:
        until: `[..., Tk]` int32, the first position that does not see the key, in the window or selected; 0 for
            padding.
        lists: `[..., n_tiles, size]` int32, as in `Scan`.
        leavers, bounds: as in `lists.Tables`; `None` if tiles are larger than a chunk.
    """

    until: Tensor
    lists: Tensor
    leavers: Tensor | None
    bounds: Tensor | None


def list_class(size: int) -> tuple[int, int]:
    """Return what lists of `size` keys have in common with others that are scanned by the same compiled kernels."""
    return size.bit_length(), (size - 1).bit_length()


def supports(scores: Tensor, *, size: int, queries: int, tile: int) -> bool:
    """Tell whether the kernels run: float32, tiles of 16, 32, 64 or n * 128, lists of at most 8,192 keys."""
    fits = tile in (16, 32, 64) or (tile > 0 and tile % _CHUNK == 0)
    return (
        fits and scores.dtype == torch.float32 and scores.numel() > 0 and queries > 0 and size <= reference.MOST_LISTED
    )


def scan_prefixes(
    scores: Tensor,
    k: int,
    *,
    size: int,
    queries: int,
    window: int,
    tile: int = _CHUNK,
    with_lists: bool = False,
) -> Scan:
    """Scan as `hf_sparse.ops.selection.thresholds.scan_prefixes` does with tau, by the same arguments and tie rule.

    By kernels where `supports` says so, which must then run on the device of the scores; by that function elsewhere.
    Of the kernels, ranks are other integers (they hold the score itself) with the same meaning, lists are int32, of
    `min(size, Tk)` keys in the order of their ranks, best first, and tau is float32: scores that are large against 1
    lose digits of it, unless a constant is subtracted from all of a row.

    Args:
        scores: `[..., Tk]` float32 or float64, `-inf` for keys that can never be selected.
    """
    size = min(size, scores.shape[-1])
    if not supports(scores, size=size, queries=queries, tile=tile):
        return reference.scan_prefixes(
            scores, k, size=size, queries=queries, window=window, tile=tile, with_tau=True, with_lists=with_lists
        )
    tau, rank, floor, lists = _TritonThresholds.apply(
        scores, ScanPlan(k, size, queries, window, tile, True, with_lists)
    )
    return Scan(rank, floor, tau, lists)


def select_keys(scores: Tensor, size: int, *, queries: int, window: int, tile: int = _CHUNK) -> Selection:
    """Find the interval of queries that each key is among the `size` best of, as hard gates need it.

    Args:
        scores: `[..., Tk]` float32 that `supports`, on the device on which kernels run.
        size, queries, window, tile: as in `scan_prefixes`.
    """
    plan = ScanPlan(size, min(size, scores.shape[-1]), queries, window, tile, False, True)
    with torch.cuda.device_of(scores):
        return launch_selection(scores.contiguous(), plan)


class _TritonThresholds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, plan: ScanPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(scores):  # where Triton launches
            rank, floor, tau, lists, _ = launch_scan(scores.contiguous(), plan)
        ctx.save_for_backward(scores, rank, floor, tau)
        ctx.first = plan.window - (scores.shape[-1] - plan.queries)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(rank, floor, lists)
        return tau, rank, floor, lists

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Move tau by one over the number of its free keys with each of them, as `ops.selection.thresholds` does."""
        scores, rank, floor, tau = ctx.saved_tensors  # type: ignore[attr-defined]
        arguments = (scores.contiguous(), rank, floor, tau, grad.contiguous()[..., None])
        return launch_backward(*arguments, ctx.first), None  # type: ignore[attr-defined]


def launch_backward(
    scores: Tensor, rank: Tensor, floor: Tensor, tau: Tensor, grad: Tensor, arrival: int, d_scores: Tensor | None = None
) -> Tensor:
    """Launch the backward of tau: `[..., Tk]`, added to `d_scores` in place if that is given.

    Args:
        scores: `[..., Tk]`, less what was subtracted from tau.
        rank, floor, tau: of the scan.
        grad: `[..., Tq, G]` float32, of tau; it is summed over the last dimension.
        arrival: key j is eligible from query `j + arrival` on.
        d_scores: `[..., Tk]` float32, what is there already.
    """
    keys, queries, device = scores.shape[-1], tau.shape[-1], scores.device
    rows = math.prod(scores.shape[:-1])
    begin = empty(scores.shape, torch.int32, device)
    end, share = empty(scores.shape, torch.int32, device), empty(tau.shape, torch.float32, device)
    change = zeros((*tau.shape[:-1], queries + 1), torch.int32, device)
    by_key, by_query = ((triton.cdiv(number, _KEYS), rows) for number in (keys, queries))
    total = empty((rows, by_query[0]), torch.float32, device)
    steps, add = queries.bit_length(), d_scores is not None
    launch(free_intervals, by_key)(
        scores, rank, floor, tau, begin, end, change, keys, queries, arrival, steps, BLOCK=_KEYS
    )
    launch(shares, by_query)(grad, change, share, total, queries, GROUP=grad.shape[-1], BLOCK=_KEYS)
    d_scores = empty(scores.shape, torch.float32, device) if d_scores is None else d_scores
    before = empty((rows, by_query[0] + 1), torch.float32, device)
    launch(sum_totals, (rows,))(total, before, by_query[0], MANY=_BLOCKS)
    launch(sum_shares, by_key)(share, before, begin, end, d_scores, keys, queries, by_query[0], ADD=add, BLOCK=_KEYS)
    return d_scores


class _Chunks(NamedTuple):
    """Hold how keys and queries are cut; all is counted from the first key of the first chunk.

    Attributes:
        C: keys of a chunk, and queries of a tile of the kernels, which may be a part of the caller's.
        tiles: number of tiles. The keys that become eligible during tile i are those of chunk `before + i`.
        every: number of tiles in a row that share a list.
        before: number of chunks whose keys are eligible for every query.
        start: position of the first key of the first chunk, which may be negative.
    """

    C: int
    tiles: int
    every: int
    before: int
    start: int


def _chunks_of(keys: int, plan: ScanPlan) -> _Chunks:
    C = min(plan.tile, _CHUNK)
    every = plan.tile // C
    newest = keys - plan.queries - plan.window + 1
    before = triton.cdiv(min(max(newest, 0), keys), C)
    return _Chunks(C, triton.cdiv(plan.queries, plan.tile) * every, every, before, newest - before * C)


def _in_one_launch(cut: _Chunks, size: int) -> bool:
    """Tell whether a program has the list of a tile for itself, and writes nothing that other programs write."""
    return size <= _JOINING[0] and cut.before == 0


class _Merged(NamedTuple):
    """Hold lists of `merge_groups`, `[rows, lists, width]`, of lists of `narrow` keys in groups of `group`."""

    lists: Tensor
    group: int
    narrow: int


def _sort(
    scores: Tensor,
    cut: _Chunks,
    plan: ScanPlan,
    first: Tensor | None,
    sinks: int,
    counts: Tensor | None,
    rank: Tensor | None,
    until: Tensor | None,
) -> tuple[Tensor, Callable[..., None]]:
    """Sort the chunks, write ranks or what is known of `until`, and merge lists.

    Returns:
        `[rows, chunks, C]` int64, the sorted chunks, and a function that writes the lists before each tile: it takes
        `Codes`, `Lowest`, `Index` and `Until` of `join_groups`.
    """
    keys, device, size = scores.shape[-1], scores.device, plan.size
    rows, heads = math.prod(scores.shape[:-1]), scores.shape[-2] if scores.ndim > 1 else 1
    C, tiles, every, before, start = cut
    chunks = before + tiles

    def codes(*shape: int) -> Tensor:
        return empty((rows, *shape), torch.int64, device)

    of_chunks = codes(chunks, C)
    launch(sort_chunks, (max(chunks, triton.cdiv(keys - start, C)), rows))(
        scores, first, rank, until, of_chunks, heads, sinks, keys, plan.queries, chunks, start, plan.window,
        C, num_warps=_SORT_WARPS,
    )  # fmt: skip

    # Each list of a level is merged with those before it in its group; the last of a group, all of it, goes on to the
    # next level if a list after the group needs it.
    # The first level has programs enough to hide that a search waits for one load after another; later ones do not,
    # and search by four.
    levels: list[_Merged] = []
    source, row, item, narrow, lists = of_chunks, chunks * C, C, C, chunks - 1
    # One level spares the host a launch, and takes the GPU at most 4 us longer where lists are few and short.
    few = lists <= _GROUPS[1] and size <= _JOINING[0]
    group = _GROUPS[1 if few else 0]
    while lists > 0:
        width = min(size, group * narrow)
        target = codes(lists, width)
        block, many = _MERGING
        block = min(block, triton.next_power_of_2(narrow))
        launch(merge_groups, (lists, rows, triton.cdiv(min(narrow, size), block)))(
            source, target, counts, row, item, narrow, width, lists, group, heads,
            BLOCK=block, MANY=many, STEPS=min(narrow, size).bit_length(), BY_FOUR=bool(levels), num_warps=1,
        )  # fmt: skip
        levels.append(_Merged(target, group, narrow))
        source, row, item, narrow = target[:, group - 1 :], lists * width, group * width, width
        lists, group = (lists - 1) // group, _GROUPS[1]

    def join(
        level: _Merged,
        totals: Tensor,
        items: int,
        before: int,
        *wanted: Tensor | None,
        evicted: tuple[Tensor | None, ...] = (),
    ) -> None:
        """Join the lists of a level with those of the groups before; `evicted` are tensors of `join_and_evict`."""
        width, block = level.lists.shape[-1], min(_JOINING[0], triton.next_power_of_2(max(size, 16)))
        of_lists = (level.group, level.narrow, *totals.shape[1:], level.lists.shape[1], width, start, every, keys)
        compiled = {
            "BLOCK": block,
            "PART": min(block, _JOINING[1]),
            "WIDTH": triton.next_power_of_2(max(width, 16)),
            "STEPS": size.bit_length(),
            "num_warps": max(1, min(_JOINING[2], block // 32)),
        }
        if evicted:
            _, lowest, index, _ = wanted
            launch(join_and_evict, (items, rows))(
                totals, level.lists, lowest, index, counts, of_chunks, *evicted, *of_lists, plan.queries, chunks,
                plan.window, size, heads, C, EVICTED=min(C, _EVICTING[0]), **compiled,
            )  # fmt: skip
        else:
            launch(join_groups, (items, rows, triton.cdiv(size, block)))(
                totals, level.lists, *wanted, counts, before, *of_lists, size, heads, C, **compiled
            )

    base = levels[0] if levels else _Merged(of_chunks, 1, C)
    totals = levels[-1].lists if len(levels) > 1 else base.lists
    for level in reversed(levels[1:-1]):
        joined = codes(level.lists.shape[1], size)
        join(level, totals, joined.shape[1], 1, joined, None, None, None)
        totals = joined
    return of_chunks, partial(join, base, totals, tiles, before)


def launch_scan(
    scores: Tensor,
    plan: ScanPlan,
    first: Tensor | None = None,
    sinks: int = 0,
    shift: bool = False,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Launch the scan of scores that `supports` takes, on their device.

    Args:
        scores: `[..., Tk]`, contiguous; of padding and sinks they may be anything.
        plan: see `ScanPlan`, `size` at most `Tk`.
        first: `[B]`, the first key of each row of the batch that is no padding; `None` for 0.
        sinks: so many keys from there on are no candidates.
        shift: subtract a score near the thresholds of a row from tau.
        counts: `[2, Hkv]` int32 for scores `[B, Hkv, Tk]`: `k` and `size` of each KV head, where they differ; those of
            the plan are the largest then.

    Returns:
        Ranks `[..., Tk]`, floors `[..., Tq]`, tau `[..., Tq]`, lists, and what was subtracted, `[rows]` or `None`.
    """
    batch, keys, device = scores.shape[:-1], scores.shape[-1], scores.device
    queries, size = plan.queries, plan.size
    rows, heads = math.prod(batch), batch[-1] if batch else 1
    cut = _chunks_of(keys, plan)
    C, tiles, before = cut.C, cut.tiles, cut.before
    rank, floor = empty((*batch, keys), torch.int64, device), empty((*batch, queries), torch.int64, device)
    of_chunks, join = _sort(scores, cut, plan, first, sinks, counts, rank, None)
    best = empty((rows, tiles, size), torch.int64, device)
    index = empty((*batch, tiles // cut.every, size), torch.int32, device) if plan.with_lists else None
    join(best, None, index, None)

    chunks, Q = of_chunks.shape[1], min(_TAUS, C)
    longest, steps = triton.next_power_of_2(size), size.bit_length()
    origin = None
    if shift:
        origin = empty((rows,), torch.float32, device)
        launch(find_origins, (rows,))(
            best, of_chunks, counts, origin, tiles, chunks, size, plan.k, heads, C, longest, num_warps=4
        )
    sums = empty(best.shape, torch.float64, device)
    launch(sum_lists, (tiles, rows))(best, counts, origin, sums, size, heads, longest, num_warps=4)
    bounds = empty((rows, tiles), torch.float64, device)
    launch(tile_thresholds, (triton.cdiv(tiles, _LISTS), rows))(
        best, sums, counts, origin, bounds, tiles, size, plan.k, heads, _LISTS, steps, num_warps=1
    )
    raw = empty((rows, tiles * C), torch.float32, device)
    launch(query_thresholds, (tiles * C // Q, rows))(
        best, sums, of_chunks, counts, origin, bounds, floor, raw, queries, chunks, before, size, plan.k, heads, C, Q,
        longest, steps, num_warps=4,
    )  # fmt: skip
    tau = empty((*batch, queries), torch.float32, device)
    launch(raise_thresholds, (tiles * C // Q, rows))(raw, tau, queries, Q, num_warps=4)
    lists = empty((*batch, 0, size), torch.int32, device) if index is None else index
    return rank, floor, tau, lists, origin


def launch_selection(
    scores: Tensor, plan: ScanPlan, first: Tensor | None = None, sinks: int = 0, counts: Tensor | None = None
) -> Selection:
    """Launch what hard gates need, which have no threshold: see `launch_scan` for the arguments."""
    batch, keys, device = scores.shape[:-1], scores.shape[-1], scores.device
    rows, heads = math.prod(batch), batch[-1] if batch else 1
    cut = _chunks_of(keys, plan)
    C, tiles = cut.C, cut.tiles
    until = empty(scores.shape, torch.int32, device)
    of_chunks, join = _sort(scores, cut, plan, first, sinks, counts, None, until)
    lowest = empty((rows, tiles, C), torch.int64, device)
    index = empty((*batch, tiles // cut.every, plan.size), torch.int32, device)
    notes = empty((rows, tiles, 3, C), torch.int32, device)
    leavers = bounds = None
    if cut.every == 1:
        leavers, bounds = (empty((*batch, tiles, *of), torch.int32, device) for of in ((C,), (2, C)))
    if _in_one_launch(cut, plan.size):
        join(None, lowest, index, None, evicted=(notes, until, leavers, bounds))
    else:
        join(None, lowest, index, until if cut.before else None)
        launch(evictions, (tiles, rows))(
            of_chunks, lowest, index, counts, notes, until, leavers, bounds, keys, plan.queries, of_chunks.shape[1],
            cut.before, plan.window, plan.size, heads, C, PART=min(C, _EVICTING[0]), num_warps=_EVICTING[1],
        )  # fmt: skip
    return Selection(until, index, leavers, bounds)
