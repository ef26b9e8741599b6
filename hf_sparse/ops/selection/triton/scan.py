"""Scan prefixes as `hf_sparse.ops.selection.thresholds` does, on a GPU, in a number of launches that grows as log T.

The best `size` keys of a prefix are an associative function of its parts: those of two neighbouring parts are the
first `size` of their merged lists. So the keys are cut into chunks of a tile each, and

    sort_chunks       sorts each chunk and each beginning of a block of 4 chunks                        1 launch
    merge_earlier     makes the lists of the blocks those of all keys up to their end       log2(T / 512) launches
    merge_for_tiles   joins both into the best keys before each tile                                    1 launch
    tile_thresholds   solves for tau before each tile                                                   1 launch
    query_thresholds  solves for floor and tau of all queries, from the list of their tile and its chunk

Merging looks up each key's place in the other list, which needs no communication between threads. With
`size` = s the work is O(T log s), plus O(T / 512 * s * log T) for the rounds, all of it parallel; nothing waits for
the host. The derivation is ours.

In the backward `free_intervals` finds the queries whose tau moves with a key, `shares` divides the gradient of each
among its free keys, `sum_totals` and `sum_shares` add up those of every key; one launch each.
"""

import math

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.selection import thresholds as reference
from hf_sparse.ops.selection.thresholds import Scan, ScanPlan
from hf_sparse.ops.selection.triton.scan_kernels import merge_earlier, merge_for_tiles, sort_chunks
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
_BLOCK = 4  # chunks per block
_SORT_WARPS = 4
_FLOORS = (64, 4)  # queries and warps of a program that looks for floors
_TAUS = (64, 4)  # queries and warps of a program that solves for tau as well
_LISTS = 32  # per program that solves for their thresholds
_KEYS = 256  # keys or queries per program of the backward
_BLOCKS = 256  # sums of so many programs are added up at a time


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
    with_tau: bool = False,
    with_lists: bool = False,
) -> Scan:
    """Scan as `hf_sparse.ops.selection.thresholds.scan_prefixes` does, with the same arguments and tie rule.

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
            scores, k, size=size, queries=queries, window=window, tile=tile, with_tau=with_tau, with_lists=with_lists
        )
    plan = ScanPlan(k, size, queries, window, tile, with_tau, with_lists)
    if not with_tau:
        rank, floor, _, lists = _run(scores.detach(), plan)
        return Scan(rank, floor, None, lists)
    tau, rank, floor, lists = _TritonThresholds.apply(scores, plan)
    return Scan(rank, floor, tau, lists)


class _TritonThresholds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, plan: ScanPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rank, floor, tau, lists = _run(scores, plan)
        assert tau is not None
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


def _run(scores: Tensor, plan: ScanPlan) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Compute ranks `[..., Tk]`, floors `[..., Tq]`, tau if asked for, and lists."""
    with torch.cuda.device_of(scores):  # where Triton launches
        return launch_scan(scores.contiguous(), plan)[:4]


def launch_scan(
    scores: Tensor,
    plan: ScanPlan,
    first: Tensor | None = None,
    sinks: int = 0,
    shift: bool = False,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
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
        Ranks `[..., Tk]`, floors `[..., Tq]`, tau `[..., Tq]` or `None`, lists, and what was subtracted, `[rows]`
        or `None`.
    """
    batch, keys, device = scores.shape[:-1], scores.shape[-1], scores.device
    queries, size = plan.queries, plan.size
    rows = math.prod(batch)
    C = min(plan.tile, _CHUNK)
    every = plan.tile // C
    tiles = triton.cdiv(queries, plan.tile) * every  # of C queries each
    # The newcomers of tile i are those of chunk `before + i`. The chunks before hold what every query sees.
    newest = keys - queries - plan.window + 1
    before = triton.cdiv(min(max(newest, 0), keys), C)
    start = newest - before * C  # position of the first key of the first chunk
    blocks = triton.cdiv(before + tiles, _BLOCK)
    chunks = blocks * _BLOCK

    def codes(*shape: int) -> Tensor:
        return empty((rows, *shape), torch.int64, device)

    rank, floor = empty((*batch, keys), torch.int64, device), empty((*batch, queries), torch.int64, device)
    chunk_lists = codes(chunks, C)
    width = min(size, _BLOCK * C)
    lists = codes(chunks, width)
    covered = max(chunks, triton.cdiv(keys - start, C))
    heads = scores.shape[-2] if scores.ndim > 1 else 1
    launch(sort_chunks, (covered, rows))(
        scores,
        first,
        rank,
        chunk_lists,
        lists,
        heads,
        sinks,
        keys,
        chunks,
        start,
        width,
        C,
        _BLOCK,
        num_warps=_SORT_WARPS,
    )

    # Lists of the blocks, and then of all keys up to the end of each. Nobody sees the end of the last block.
    source, source_row, source_list, source_width = lists[:, _BLOCK - 1 :], chunks * width, _BLOCK * width, width
    reach, last = 1, blocks - 1
    targets: list[Tensor] = []  # two, which take turns
    while last and (reach < last or reach == 1):
        target_width = min(size, 2 * source_width)
        if len(targets) < 2:
            targets.append(codes(last, size))
        target = targets[0 if source is not targets[0] else 1]
        grid, shape = _merging(last, rows, target_width, source_width)
        launch(merge_earlier, grid)(
            source, target, counts, source_row, source_list, source_width, target_width, reach, heads, **shape
        )
        source, source_row, source_list, source_width = target, last * target_width, target_width, target_width
        reach *= 2
    best = codes(tiles, size)
    index = empty((*batch, tiles // every if plan.with_lists else 0, size), torch.int32, device)
    grid, shape = _merging(tiles, rows, size, max(source_width, width))
    launch(merge_for_tiles, grid)(
        source, lists, best, index, counts, last, source_width, chunks, width, before, start, every, size, heads, C,
        _BLOCK, WITH_INDEX=plan.with_lists, **shape,
    )  # fmt: skip

    Q, warps = _TAUS if plan.with_tau else _FLOORS
    Q = min(Q, C)
    longest, steps = triton.next_power_of_2(size), size.bit_length()
    sums = bounds = raw = tau = origin = None
    if plan.with_tau:
        if shift:
            origin = empty((rows,), torch.float32, device)
            launch(find_origins, (rows,))(
                best, chunk_lists, counts, origin, tiles, chunks, size, plan.k, heads, C, longest, num_warps=4
            )
        sums = empty(best.shape, torch.float64, device)
        launch(sum_lists, (tiles, rows))(best, counts, origin, sums, size, heads, longest, num_warps=4)
        bounds = empty((rows, tiles), torch.float64, device)
        launch(tile_thresholds, (triton.cdiv(tiles, _LISTS), rows))(
            best, sums, counts, origin, bounds, tiles, size, plan.k, heads, _LISTS, steps, num_warps=1
        )
        raw = empty((rows, tiles * C), torch.float32, device)
    launch(query_thresholds, (tiles * C // Q, rows))(
        best, sums, chunk_lists, counts, origin, bounds, floor, raw, queries, chunks, before, size, plan.k, heads, C, Q,
        longest, steps, WITH_TAU=plan.with_tau, num_warps=warps,
    )  # fmt: skip
    if raw is not None:
        tau = empty((*batch, queries), torch.float32, device)
        launch(raise_thresholds, (tiles * C // Q, rows))(raw, tau, queries, Q, num_warps=4)
    return rank, floor, tau, index, origin


def _merging(lists: int, rows: int, width: int, longest: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid and constants of a kernel that merges into lists of `width` from lists of at most `longest`."""
    block = min(1024, triton.next_power_of_2(max(width, 16)))
    constants = {"BLOCK": block, "STEPS": longest.bit_length(), "num_warps": max(1, min(4, block // 128))}
    return (lists, rows, triton.cdiv(width, block)), constants
