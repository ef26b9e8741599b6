"""Attend with entmax over the candidates of a group of rows: products, thresholds, weights, and values.

Groups with few candidates are those of `few`. Of the others, a program takes one after the other. It
writes the keys that any row of the group may attend to out as a list, from the bits of `sweep` or from listed tiles,
gathers them once for all rows, keeps the products in a buffer of its own, finds every tau there, and gathers the values
of the keys with weight. A single query that attends to most keys gives its group as many: some programs have buffers
for these, and take them before anything else. Groups with more keys than that are marked and left to the kernel in
`tiles`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import (
    STEPS,
    Numbers,
    constants,
    exponent_of,
    gathered_logits,
    goes_on,
    is_slim,
    largest,
    load_rows,
    newton_step,
    powers,
    scale_of,
    summed,
)
from hf_sparse.ops.entmax.triton.few import Few, attend_few, keys_of_bits
from hf_sparse.ops.entmax.triton.jobs import (
    LENGTHS,
    Lists,
    arguments_of,
    group_count,
    keys_of_slots,
    rows_of_group,
    turn_of_group,
)
from hf_sparse.ops.entmax.triton.sweep import GROUP_ROWS, TURNS, Candidates, is_far
from hf_sparse.ops.triton.early import early, take_over
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, zeros
from hf_sparse.ops.triton.sizes import padded


class Attended(NamedTuple):
    """Hold the result of a forward pass.

    output: `[B, Tq, Hq, D]`: heads lie beside one another, as models want them afterwards.
    tau: `[B, Hq, Tq]` float32, `-inf` for a row without a key.
    counts: `[B, Hq, Tq]` int32, keys with weight.
    slopes: `[B, Hq, Tq, D]` float32, values averaged with `[z - tau]_+ ** (e - 1)`, for the backward.
    support: `[groups, kept]` int32, the keys with weight in any row of a group, for the backward.
    lengths: `[groups]` int32, how many these are; -1 for a group that is marked, -2 for one with more than `kept`.
    """

    output: Tensor
    tau: Tensor
    counts: Tensor
    slopes: Tensor | None
    support: Tensor | None
    lengths: Tensor


class Buffered(NamedTuple):
    """Hold the sizes of a program that keeps products in a buffer.

    chunk: keys at a time.
    warps, stages, depth: of Triton; stages in the loops that gather, depth in those that read products.
    programs: how many share a multiprocessor, and `large` how many of them have buffers for the most candidates.
    wide: products of a row that are held in registers.
    registers: the most that a thread may have; any number by default.
    """

    chunk: int
    warps: int
    programs: int
    stages: int = 2
    wide: int = 64
    registers: int | None = None
    depth: int = 3
    large: int = 1


def buffered_sizes(query: Tensor, key: Tensor, lists: Lists | None) -> Buffered:
    """Return the sizes of the kernel that keeps products."""
    if is_slim(query):
        # Over all keys of a long text many groups need large buffers; those of a longer one would take too much memory.
        if is_far(query, key, lists):
            return Buffered(128, 4, 4, stages=3, wide=128, registers=128, depth=1, large=3)
        return Buffered(128, 4, 3, stages=3, wide=128, registers=168, depth=1)
    return Buffered(chunk_of(query), 2, 8)


def chunk_of(query: Tensor) -> int:
    """Return how many keys a program gathers at a time."""
    dim = padded(query.shape[3])
    most = 64 if dim <= 64 else 32
    return most if query.dtype != torch.float32 else most // 2


def attend_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Numbers,
    first: Tensor | None,
    valid: Tensor | None,
    causal: bool,
    lists: Lists | None,
    found: Candidates | None,
    most: int,
    kept: int,
    trains: bool,
    few: Few,
    buffered: Buffered,
) -> Attended:
    """Return output and thresholds of all groups whose keys fit into the buffer.

    Args:
        query, key, value, numbers, first, valid, causal: as in `sweep.candidates`.
        lists: tiles of keys for every tile of queries; all keys by default.
        found: candidates of every group; None where all listed keys are candidates.
        most: candidates of a group that lists and large buffers take.
        kept: candidates of a group that the buffers of most programs take, and keys with weight that are kept.
        trains: whether there will be a backward.
        few, buffered: sizes of the kernel for groups with few candidates, which runs where `found` is given, and of
            that with buffers. `most` and `kept` are whole chunks of these, or those of few candidates.
    """
    batch, heads, queries, dim = query.shape
    device = query.device
    groups = group_count(query, lists)
    output = empty((batch, queries, heads, dim), query.dtype, device)
    tau = empty((batch, heads, queries), torch.float32, device)
    counts = empty((batch, heads, queries), torch.int32, device)
    slopes = empty(query.shape, torch.float32, device) if trains else None
    support = empty((groups, kept), torch.int32, device) if trains else None
    turn, queue = (zeros((TURNS,), torch.int32, device), None) if found is None else (found.turn, found.queue)
    lengths = empty((groups,), torch.int32, device)
    bits = (None, None, None, None) if found is None else (found.bound, found.words, found.blocks, found.counts)
    capacity = 0 if found is None else found.words.shape[1]
    given = (query, key, value, *numbers.arguments, first, valid, *bits)
    who = (*arguments_of(query, key, lists), *query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    fixed = constants(query, key, numbers.kind, causal)
    fixed |= {"N": 0 if found is None else found.size, "M": GROUP_ROWS, "SAVE": trains}
    into = (lengths, output, tau, counts, slopes, groups, capacity, kept)
    at_once = min(groups, buffered.programs * _multiprocessors(device))
    large = 0 if found is None else min(at_once, buffered.large * _multiprocessors(device))
    gathered = empty((at_once, most), torch.int32, device)
    reached = empty((at_once, kept), torch.int32, device) if found is None else None
    products = empty((large * most + (at_once - large) * kept, GROUP_ROWS), torch.float32, device)
    launch(_groups, (at_once,))(
        *given, gathered, support, turn, queue, *into, reached, products, most, large, *who, **fixed, C=buffered.chunk,
        WIDE=buffered.wide, STAGES=buffered.stages, DEPTH=buffered.depth, LANES=32 * buffered.warps, **early(),
        num_warps=buffered.warps, num_stages=1, maxnreg=buffered.registers,
    )  # fmt: skip
    if found is not None:
        of_few = empty((groups, few.keys), torch.int32, device)
        launch(attend_few, (groups,))(
            *given, found.totals, of_few, support, *into, *who, **fixed, C=few.keys, LANES=32 * few.warps, **early(),
            num_warps=few.warps, num_stages=1,
        )  # fmt: skip
    return Attended(output, tau, counts, slopes, support, lengths)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _keys_of_tiles(
    Index, List, end, Valid, batch, keys, size, last, most, CAUSAL: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Write the keys of listed tiles up to `last` to `List`, without padding, and return how many there are."""
    total = 0
    lane = tl.arange(0, LANES)
    for begin in range(0, end, LANES):
        key, there = keys_of_slots(begin + lane, end, Index, Valid, batch, keys, size)
        if CAUSAL:
            there &= key <= last
        one = there.to(tl.int32)
        place = total + tl.cumsum(one, 0) - one
        total += tl.sum(one, 0)
        tl.store(List + place, key, mask=there & (place < most))
    return total


@triton.jit
def _next(Turn, turn, giants):
    """Return the turn after another one: those of groups for large buffers end before those of the queue begin."""
    if turn < giants:
        turn = tl.atomic_add(Turn + 4, 1, sem="relaxed")
    if turn >= giants:
        turn = giants + tl.atomic_add(Turn, 1, sem="relaxed")
    return turn


@triton.jit(do_not_specialize=[*LENGTHS, "groups", "capacity", "most", "kept", "large"])
def _groups(
    Q, K, V, Scale, factor, Exponent, First, Valid, Bound, Words, Numbers, Counts, Found, Support, Turn, Queue, Lengths,
    Out, Tau, Sizes, Slopes, groups, capacity, kept, Reached, Products, most, large,
    Index, Listed, i_batch, i_list, i_tile, queries, keys, heads, lists, query_tiles, rows, lead, size, share,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, SAVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_over(EARLY)
    dim, step = tl.arange(0, PADDED), tl.arange(0, C)
    wide = (dim < D)[None, :]
    program = tl.program_id(0).to(tl.int64)
    Products += (tl.minimum(program, large) * most + tl.maximum(program - large, 0) * kept) * M
    Found += program * most
    List = Found if Reached is None else Reached + program * kept
    # The rows of a key lie side by side.
    lane = tl.arange(0, M)[:, None]
    many = tl.arange(0, WIDE)
    # Behind the last key of a group, up to a whole chunk, products are -inf, unless a list of other keys was shortened.
    WHOLE: tl.constexpr = Reached is None and WIDE <= C
    z_place, z_wide = lane + step[None, :] * M, lane + many[None, :] * M
    first, waiting, giants = 0, groups, 0
    if Queue is not None:
        first, giants = tl.load(Turn + 1), tl.load(Turn + 3)
        waiting = giants + first + tl.load(Turn + 2)
    turn = _next(Turn, tl.where(program < large, -1, giants), giants)
    while turn < waiting:
        if Queue is not None:
            queued = turn - giants
            queued = groups + tl.where(queued < first, queued, groups - 1 - (queued - first))
            group = tl.load(Queue + tl.where(turn < giants, turn, queued))
        else:
            group = turn_of_group(turn, groups, query_tiles, rows, share, M)
        job, batch, number, tile, head, index, position, exists, inside = rows_of_group(
            group, Index, First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M
        )
        row = (batch * heads + head) * queries + index
        last = tl.max(tl.where(exists, position, -1), 0)
        listed = Index
        if Index is not None:
            listed = Index + batch * i_batch + number * i_list + tile * i_tile
        total = most + 1
        tl.debug_barrier()  # the buffers of the last group have been read
        if Words is not None:
            blocks = tl.load(Counts + group)
            if blocks <= capacity:
                bits = group.to(tl.int64) * capacity
                total = keys_of_bits(Words, Numbers, bits, listed, size, Found, blocks, most, N, LANES)
        else:
            end = tl.where(last >= 0, tl.load(Listed + job) * size, 0)
            total = _keys_of_tiles(listed, Found, end, Valid, batch, keys, size, last, most, CAUSAL, LANES)
        over = total > most
        total = tl.where(over, 0, total)
        scale, exponent = scale_of(Scale, factor, head), exponent_of(Exponent, head, KIND)
        q = load_rows(Q, batch * q_batch + head * q_head + index.to(tl.int64) * q_row, exists, dim, D)
        kv = number * share // GROUP
        k_base, v_base = K + batch * k_batch + kv * k_head, V + batch * v_batch + kv * v_head
        if Bound is not None:
            bound = tl.load(Bound + row, mask=inside, other=float("inf"))
        else:
            bound = tl.full([M], float("-inf"), tl.float32)
        spot, out_spot = row, (batch * queries + index) * heads + head
        tl.debug_barrier()  # the list is written
        W: tl.constexpr = min(C, 32)  # sums of a row that are held; fewer registers than one for each key
        peaks = tl.full([M, W], float("-inf"), tl.float32)
        # A step of Newton's method from the bound, where there is one.
        origin = tl.where(bound > float("-inf"), bound, float("inf"))
        masses, gradients = tl.zeros([M, W], tl.float32), tl.zeros([M, W], tl.float32)
        left = 0
        for begin in tl.range(0, total, C, num_stages=STAGES):
            there = begin + step < total
            key = tl.load(Found + begin + step, mask=there, other=0)
            # Behind the last key it is key 0, which no row is told to see.
            k = tl.load(k_base + (key.to(tl.int64) * k_row)[:, None] + dim[None, :], mask=wide, other=0.0)
            z = gathered_logits(q, k, key, there, exists, position, scale, CAUSAL, PRECISION)
            peaks = tl.maximum(peaks, largest(z))
            if Bound is None:  # no threshold is below the largest product so far less 1
                bound = tl.maximum(bound, tl.max(z, 1) - 1 - 4e-6)
            else:
                weight, gradient = powers(tl.maximum(z - origin[:, None], 0.0), exponent[:, None], KIND)
                masses += summed(weight)
                gradients += summed(gradient)
            if Reached is None:
                tl.store(Products + (z_place + begin * M), z)
            else:
                one = tl.max((z > bound[:, None]).to(tl.int32), 0)
                place = left + tl.cumsum(one, 0) - one
                left += tl.sum(one, 0)
                keep = (one > 0) & (place < kept)
                tl.store(List + place, key, mask=keep)
                tl.store(Products + lane + place[None, :] * M, z, mask=keep[None, :])
        if Reached is not None:
            total = left
            over |= total > kept
        if over:
            tl.store(Lengths + group, -1)
        else:
            peak = tl.max(peaks, 1)
            tau = tl.maximum(peak - 1, bound)
            if Bound is not None:
                tau = tl.maximum(tau, bound + newton_step(tl.sum(masses, 1), tl.sum(gradients, 1), exponent, KIND))
            # By way of memory, the compiler does not lay out what follows as matrix products are.
            tl.store(Tau + spot, tl.where(peak > float("-inf"), tau, float("-inf")), mask=inside)
            tl.debug_barrier()
            tau = tl.load(Tau + spot, mask=inside, other=float("-inf"))
            some = tau > float("-inf")
            tau = tl.where(some, tau, 0.0)
            rises, steps = tl.max(some.to(tl.int32), 0), 0
            # These stay in registers.
            if WHOLE:
                near = tl.load(Products + z_wide)
            else:
                near = tl.load(Products + z_wide, mask=(many < total)[None, :], other=float("-inf"))
            while (rises > 0) & (steps < STEPS):
                weight, gradient = powers(tl.maximum(near - tau[:, None], 0.0), exponent[:, None], KIND)
                weight, gradient = summed(weight), summed(gradient)
                for begin in tl.range(WIDE, total, WIDE, num_stages=DEPTH):
                    if WHOLE:
                        z = tl.load(Products + (z_wide + begin * M))
                    else:
                        there = (begin + many < total)[None, :]
                        z = tl.load(Products + (z_wide + begin * M), mask=there, other=float("-inf"))
                    more, steeper = powers(tl.maximum(z - tau[:, None], 0.0), exponent[:, None], KIND)
                    weight += summed(more)
                    gradient += summed(steeper)
                steep = tl.sum(gradient, 1)
                rise = newton_step(tl.sum(weight, 1), steep, exponent, KIND)
                tau += rise
                rises = tl.max(goes_on(rise, tau, steep, total, KIND).to(tl.int32), 0)
                steps += 1

            masses, gradients = tl.zeros([M, W], tl.float32), tl.zeros([M, W], tl.float32)
            count = tl.zeros([M, W], tl.int32)
            out = tl.zeros([M, PADDED], tl.float32)
            out_slopes = tl.zeros([M, PADDED], tl.float32)
            length = 0
            for begin in tl.range(0, total, C, num_stages=STAGES):
                if WHOLE:
                    z = tl.load(Products + (z_place + begin * M))
                else:
                    there = (begin + step < total)[None, :]
                    z = tl.load(Products + (z_place + begin * M), mask=there, other=float("-inf"))
                weight, gradient = powers(tl.maximum(z - tau[:, None], 0.0), exponent[:, None], KIND)
                masses += summed(weight)
                count += summed((weight > 0).to(tl.int32))
                has = tl.max(weight, 0) > 0
                key = tl.load(List + begin + step, mask=begin + step < total, other=0)
                v = load_rows(v_base, key.to(tl.int64) * v_row, has, dim, D)
                out = tl.dot(weight.to(v.dtype), v, out, input_precision=PRECISION)
                if Slopes is not None:
                    gradients += summed(gradient)
                    out_slopes = tl.dot(gradient.to(v.dtype), v, out_slopes, input_precision=PRECISION)
                if SAVE:
                    one = has.to(tl.int32)
                    place = length + tl.cumsum(one, 0) - one
                    length += tl.sum(one, 0)
                    tl.store(Support + group.to(tl.int64) * kept + place, key, mask=has & (place < kept))
            mass, slope = tl.sum(masses, 1), tl.sum(gradients, 1)
            mass, slope = tl.where(some, mass, 1.0), tl.where(some, slope, 1.0)
            tl.store(
                Out + out_spot[:, None] * D + dim[None, :], (out / mass[:, None]).to(Out.dtype.element_ty),
                mask=inside[:, None] & wide,
            )  # fmt: skip
            if Slopes is not None:
                tl.store(
                    Slopes + spot[:, None] * D + dim[None, :], out_slopes / slope[:, None],
                    mask=inside[:, None] & wide,
                )  # fmt: skip
            tl.store(Tau + spot, tl.where(some, tau, float("-inf")), mask=inside)
            tl.store(Sizes + spot, tl.sum(count, 1), mask=inside)
            tl.store(Lengths + group, tl.where(length > kept, -2, length))
        turn = _next(Turn, turn, giants)
