"""Attend with entmax over the candidates of groups that have few: a program for each, and no buffers of products.

The keys of a group are gathered at once, and their products, thresholds and weights stay in registers. `sorted_groups`
puts groups with more candidates into a queue for the kernel in `groups`, which is launched before: its programs with
the most candidates would be the last ones otherwise, while most of the GPU has nothing to do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import (
    STEPS,
    exponent_of,
    gathered_logits,
    goes_on,
    load_rows,
    newton_step,
    ones_of,
    powers,
    scale_of,
)
from hf_sparse.ops.entmax.triton.jobs import LENGTHS, rows_of_group, turn_of_group
from hf_sparse.ops.entmax.triton.sweep import GROUP_ROWS, Candidates, key_of_bit
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty
from hf_sparse.ops.triton.sizes import padded, pieces

HEAVY = 256  # candidates of a group above which it comes before those with fewer
SORTED_AT_ONCE = 16  # groups


class Few(NamedTuple):
    """Hold the sizes of a program: the most candidates of its group, and Triton's warps."""

    keys: int
    warps: int


def few_sizes(query: Tensor) -> Few:
    """Return the sizes of the kernel for groups with few candidates."""
    size = padded(query.shape[3]) * query.element_size()  # bytes of a key
    if size <= 128:
        return Few(64, 2)
    return Few(64, 4) if size <= 256 else Few(32, 4) if size <= 512 else Few(16, 4)


def sorted_groups(found: Candidates, few: Few, kept: int, query_tiles: int, rows: int, share: int) -> Tensor:
    """Return two queues `[2, groups]` int32 of the groups with more than few candidates.

    The first one has groups with more than `kept`, `found.turn[3]` of them. Of the others, those with more than `HEAVY`
    are the first of the second queue, `found.turn[1]` of them, and those with fewer the last, `found.turn[2]`.

    Args:
        found: candidates of every group.
        few: sizes of `attend_few`, which takes all groups that are in no queue.
        kept: candidates that any buffer takes.
        query_tiles, rows, share: as in `jobs.arguments_of`.
    """
    groups, capacity = found.words.shape[:2]
    queue = empty((2, groups), torch.int32, found.words.device)
    launch(_sort, (pieces(groups, SORTED_AT_ONCE),))(
        found.words, found.counts, found.turn, queue, groups, capacity, kept, query_tiles, rows, share, M=GROUP_ROWS,
        C=few.keys, MANY=max(HEAVY, few.keys), G=SORTED_AT_ONCE, W=128, num_warps=4,
    )  # fmt: skip
    return queue


@triton.jit
def count_of_bits(Words, blocks, LANES: tl.constexpr):
    """Return how many bits of a group are set."""
    total = 0
    word = tl.arange(0, LANES * 4)
    for begin in range(0, blocks * 4, LANES * 4):
        bits = tl.load(Words + begin + word, mask=begin + word < blocks * 4, other=0)
        total += tl.sum(ones_of(bits.to(tl.uint32, bitcast=True)), 0)
    return total


@triton.jit
def keys_of_bits(
    Words, Numbers, bits, Index, size, List, blocks, most, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Write the keys of the bits of a group to `List`, and return how many there are.

    The group's blocks begin at block `bits` of all. Where their numbers are not written, they are all blocks of the
    listed tiles, or of all keys."""
    total = 0
    lane, part = tl.arange(0, LANES), tl.arange(0, 4)[None, :]
    for begin in range(0, blocks, LANES):
        number = begin + lane
        there = number < blocks
        word = tl.load(Words + bits * 4 + (number[:, None] * 4 + part), mask=there[:, None], other=0).to(
            tl.uint32, bitcast=True
        )
        if Numbers is not None:
            block = tl.load(Numbers + bits + number, mask=there, other=0)
        elif Index is not None:
            block = tl.load(Index + number * N // size, mask=there, other=0).to(tl.int32) * (size // N)
            block += number % (size // N)
        else:
            block = number
        ones = ones_of(word)
        before = tl.cumsum(ones, 1)
        of_block = tl.sum(ones, 1)
        place = (total + tl.cumsum(of_block, 0) - of_block)[:, None] + before - ones
        total += tl.sum(of_block, 0)
        for _ in range(tl.max(tl.max(ones, 1), 0)):
            rest = word & (word - 1)  # without the lowest bit
            bit = ones_of((word ^ rest) - 1)
            tl.store(List + place, key_of_bit(block[:, None], part, bit, N), mask=(word != 0) & (place < most))
            place += 1
            word = tl.where(word == 0, word, rest)
    return total


@triton.jit(do_not_specialize=[*LENGTHS, "groups", "capacity", "kept"])
def attend_few(
    Q, K, V, Scale, factor, Exponent, First, Valid, Bound, Words, Numbers, Counts, Found, Support, Lengths, Out, Tau,
    Sizes, Slopes, groups, capacity, kept,
    Index, Listed, i_batch, i_list, i_tile, queries, keys, heads, lists, query_tiles, rows, lead, size, share,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Write the results of a group of M rows with at most C candidates."""
    group = turn_of_group(tl.program_id(0), groups, query_tiles, rows, share, M)
    blocks = tl.load(Counts + group)
    bits = group.to(tl.int64) * capacity
    total = C + 1
    if blocks <= capacity:
        total = count_of_bits(Words + bits * 4, blocks, LANES)
    if total <= C:
        Found += group.to(tl.int64) * C
        _, batch, number, tile, head, index, position, exists, inside = rows_of_group(
            group, Index, First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M
        )
        if Index is not None:
            Index += batch * i_batch + number * i_list + tile * i_tile
        keys_of_bits(Words, Numbers, bits, Index, size, Found, blocks, C, N, LANES)
        row = (batch * heads + head) * queries + index
        scale, exponent = scale_of(Scale, factor, head), exponent_of(Exponent, head, KIND)
        dim, step = tl.arange(0, PADDED), tl.arange(0, C)
        q = load_rows(Q, batch * q_batch + head * q_head + index.to(tl.int64) * q_row, exists, dim, D)
        bound = tl.load(Bound + row, mask=inside, other=float("inf"))
        there = step < total
        kv = number * share // GROUP
        K += batch * k_batch + kv * k_head
        V += batch * v_batch + kv * v_head
        tl.debug_barrier()  # the list is written
        key = tl.load(Found + step, mask=there, other=0)
        k = load_rows(K, key.to(tl.int64) * k_row, there, dim, D)
        v = load_rows(V, key.to(tl.int64) * v_row, there, dim, D)
        z = gathered_logits(q, k, key, there, exists, position, scale, CAUSAL, PRECISION)
        peak = tl.max(z, 1)
        some = peak > float("-inf")
        tau = tl.where(some, tl.maximum(peak - 1, bound), 0.0)
        rises, steps = tl.max(some.to(tl.int32), 0), 0
        while (rises > 0) & (steps < STEPS):
            weight, slope = powers(tl.maximum(z - tau[:, None], 0.0), exponent[:, None], KIND)
            steep = tl.sum(slope, 1)
            rise = newton_step(tl.sum(weight, 1), steep, exponent, KIND)
            tau += rise
            rises = tl.max(goes_on(rise, tau, steep, total, KIND).to(tl.int32), 0)
            steps += 1
        weight, slope = powers(tl.maximum(z - tau[:, None], 0.0), exponent[:, None], KIND)
        out = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        out /= tl.where(some, tl.sum(weight, 1), 1.0)[:, None]
        mask = inside[:, None] & (dim < D)[None, :]
        place = ((batch * queries + index) * heads + head)[:, None] * D + dim[None, :]
        tl.store(Out + place, out.to(Out.dtype.element_ty), mask=mask)
        if Slopes is not None:
            out = tl.dot(slope.to(v.dtype), v, input_precision=PRECISION)
            out /= tl.where(some, tl.sum(slope, 1), 1.0)[:, None]
            tl.store(Slopes + row[:, None] * D + dim[None, :], out, mask=mask)
        tl.store(Tau + row, tl.where(some, tau, float("-inf")), mask=inside)
        tl.store(Sizes + row, tl.sum((weight > 0).to(tl.int32), 1), mask=inside)
        length = 0
        if SAVE:
            one = (tl.max(weight, 0) > 0).to(tl.int32)
            tl.store(Support + group.to(tl.int64) * kept + tl.cumsum(one, 0) - one, key, mask=one > 0)
            length = tl.sum(one, 0)
        tl.store(Lengths + group, length)


@triton.jit(do_not_specialize=["groups", "capacity", "kept", "query_tiles", "rows", "share"])
def _sort(
    Words, Counts, Turn, Queue, groups, capacity, kept, query_tiles, rows, share, M: tl.constexpr, C: tl.constexpr,
    MANY: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Put groups with more than C candidates into queues: with more than MANY in front, the others behind."""
    number, word = tl.program_id(0) * G + tl.arange(0, G), tl.arange(0, W)
    there = number < groups
    group = turn_of_group(number, groups, query_tiles, rows, share, M)
    blocks = tl.load(Counts + group, mask=there, other=0)
    most = tl.minimum(tl.max(blocks, 0), capacity)
    total = tl.zeros([G], tl.int32)
    for begin in range(0, most * 4, W):
        inside = begin + word[None, :] < tl.minimum(blocks, capacity)[:, None] * 4
        bits = tl.load(Words + group.to(tl.int64)[:, None] * capacity * 4 + (begin + word)[None, :], inside, other=0)
        total += tl.sum(ones_of(bits.to(tl.uint32, bitcast=True)), 1)
    total = tl.where(blocks > capacity, MANY + 1, total)
    giant = (total > kept).to(tl.int32)
    fits = (total > C) & (total <= kept)
    first, second = (fits & (total > MANY)).to(tl.int32), (fits & (total <= MANY)).to(tl.int32)
    place = tl.atomic_add(Turn + 3, tl.sum(giant, 0), sem="relaxed") + tl.cumsum(giant, 0) - giant
    tl.store(Queue + place, group, mask=giant > 0)
    Queue += groups
    place = tl.atomic_add(Turn + 1, tl.sum(first, 0), sem="relaxed") + tl.cumsum(first, 0) - first
    tl.store(Queue + place, group, mask=first > 0)
    place = tl.atomic_add(Turn + 2, tl.sum(second, 0), sem="relaxed") + tl.cumsum(second, 0) - second
    tl.store(Queue + groups - 1 - place, group, mask=second > 0)
