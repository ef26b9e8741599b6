"""Attend with entmax over the candidates of groups that have few: a program for each, and no buffers of products.

The keys of a group are gathered at once, and their products, thresholds and weights stay in registers. Groups with more
candidates are those of the kernel in `groups`, which is launched before: its programs with the most candidates would be
the last ones otherwise, while most of the GPU has nothing to do. Where programs of a kernel may come early, those of
this one take the places that the last ones of `groups` leave.
"""

from typing import NamedTuple

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
from hf_sparse.ops.entmax.triton.sweep import key_of_bit
from hf_sparse.ops.triton.early import stay
from hf_sparse.ops.triton.sizes import padded


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


@triton.jit
def keys_of_bits(
    Words, Numbers, bits, Index, size, List, blocks, most, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Write the keys of the bits of a group to `List`, and return how many there are.

    The group's blocks begin at block `bits` of all. Where their numbers are not written, they are all blocks of the
    listed tiles, or of all keys."""
    total = 0
    lane = tl.arange(0, LANES)
    for begin in range(0, blocks * 4, LANES):
        number = begin + lane
        there = number < blocks * 4
        word = tl.load(Words + bits * 4 + number, mask=there, other=0).to(tl.uint32, bitcast=True)
        block, part = number // 4, number % 4
        if Numbers is not None:
            block = tl.load(Numbers + bits + block, mask=there, other=0)
        elif Index is not None:
            listed = tl.load(Index + block * N // size, mask=there, other=0).to(tl.int32)
            block = listed * (size // N) + block % (size // N)
        ones = ones_of(word)
        place = total + tl.cumsum(ones, 0) - ones
        total += tl.sum(ones, 0)
        for _ in range(tl.max(ones, 0)):
            rest = word & (word - 1)  # without the lowest bit
            bit = ((word ^ rest).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the exponent of a power of 2
            tl.store(List + place, key_of_bit(block, part, bit, N), mask=(word != 0) & (place < most))
            place += 1
            word = tl.where(word == 0, word, rest)
    return total


@triton.jit(do_not_specialize=[*LENGTHS, "groups", "capacity", "kept"])
def attend_few(
    Q, K, V, Scale, factor, Exponent, First, Valid, Bound, Words, Numbers, Counts, Totals, Found, Support, Lengths, Out,
    Tau, Sizes, Slopes, groups, capacity, kept,
    Index, Listed, i_batch, i_list, i_tile, queries, keys, heads, lists, query_tiles, rows, lead, size, share,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, SAVE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Write the results of a group of M rows with at most C candidates.

    It is launched after `_groups`, whose results it does not read."""
    group = turn_of_group(tl.program_id(0), groups, query_tiles, rows, share, M)
    total = tl.load(Totals + group)
    if total <= C:
        blocks = tl.load(Counts + group)
        bits = group.to(tl.int64) * capacity
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
    stay(EARLY)
