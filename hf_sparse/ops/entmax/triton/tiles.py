"""Attend with entmax over all keys or over listed tiles, a tile of queries at a time, with nothing kept per pair.

Every sweep over the keys computes the products again: one for the largest, one for each step of Newton's method until
all rows of the program have arrived, one for the output. This serves the groups that have too many keys for the buffers
of `groups`.
"""

import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import (
    CLOSE,
    STEPS,
    Numbers,
    constants,
    exponent_of,
    load_rows,
    newton_step,
    powers,
    scale_of,
)
from hf_sparse.ops.entmax.triton.groups import Attended
from hf_sparse.ops.entmax.triton.jobs import (
    LENGTHS,
    Lists,
    arguments_of,
    group_count,
    keys_of_slots,
    marked_rows,
    rows_of_group,
    rows_of_job,
)
from hf_sparse.ops.entmax.triton.sweep import GROUP_ROWS, Blocks
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.sizes import padded


def tile_blocks(query: Tensor, rows: int) -> Blocks:
    """Return the sizes of a program for jobs of so many rows."""
    dim = padded(query.shape[3])
    most = 64 if dim <= 128 else 32
    return Blocks(min(most, padded(rows)), 64 if dim <= 128 else 32, 4, 2)


def attend_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Numbers,
    first: Tensor | None,
    valid: Tensor | None,
    causal: bool,
    lists: Lists | None,
    bound: Tensor | None,
    into: Attended,
    blocks: Blocks | None = None,
) -> None:
    """Write output and thresholds of the marked groups, over the listed keys or over all.

    Args:
        query, key, value, numbers, first, valid, causal, lists: as in `groups.attend_groups`.
        bound: `[B, Hq, Tq]`, that of `sweep.Candidates`, from where the search for the thresholds goes on.
        into: what that returned.
        blocks: sizes of a program; rows a multiple of `GROUP_ROWS`.
    """
    blocks = blocks or tile_blocks(query, rows_of_job(query, lists))
    launch(_tiles, (group_count(query, lists, blocks.rows),))(
        query, key, value, *numbers.arguments, first, valid, bound, into.lengths, into.output, into.tau, into.counts,
        into.slopes, *arguments_of(query, key, lists), *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        **constants(query, key, numbers.kind, causal), M=blocks.rows, N=blocks.keys, R=GROUP_ROWS,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


@triton.jit
def logits(
    q, K, slot, end, Index, Valid, batch, keys, size, position, exists, scale, dim, k_row, D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return z `[M, N]`, `-inf` where a row does not see a key; the products; the keys, which there are, and theirs."""
    key, there = keys_of_slots(slot, end, Index, Valid, batch, keys, size)
    k = load_rows(K, key.to(tl.int64) * k_row, there, dim, D)
    sees = there[None, :] & exists[:, None]
    if CAUSAL:
        sees &= key[None, :] <= position[:, None]
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return tl.where(sees, product * scale[:, None], float("-inf")), product, key, there, k


@triton.jit(do_not_specialize=LENGTHS)
def _tiles(
    Q, K, V, Scale, factor, Exponent, First, Valid, Bound, Lengths, Out, Tau, Sizes, Slopes,
    Index, Listed, i_batch, i_list, i_tile, queries, keys, heads, lists, query_tiles, rows, lead, size, share,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    job, batch, number, tile, head, index, position, exists, inside = rows_of_group(
        tl.program_id(0), Index, First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M
    )
    row = (batch * heads + head) * queries + index
    inside &= marked_rows(tl.program_id(0), Lengths, rows, share, M, R, LEAST=-1)
    exists &= inside
    if tl.max(inside.to(tl.int32), 0) > 0:
        kv = number * share // GROUP
        K += batch * k_batch + kv * k_head
        V += batch * v_batch + kv * v_head
        scale, exponent = scale_of(Scale, factor, head), exponent_of(Exponent, head, KIND)[:, None]
        dim = tl.arange(0, PADDED)
        q = load_rows(Q, batch * q_batch + head * q_head + index.to(tl.int64) * q_row, exists, dim, D)
        last = tl.max(tl.where(exists, position, -1), 0)
        if Index is None:
            end = tl.minimum(last + 1, keys) if CAUSAL else tl.where(last >= 0, keys, 0)
        else:
            Index += batch * i_batch + number * i_list + tile * i_tile
            end = tl.where(last >= 0, tl.load(Listed + job) * size, 0)
        step = tl.arange(0, N)

        # A bound below the threshold saves the sweep for the largest product; there is none where it is infinite.
        if Bound is not None:
            bound = tl.load(Bound + row, mask=inside, other=float("inf"))
            known = tl.abs(bound) < float("inf")
            unknown = tl.max((exists & (bound == float("-inf"))).to(tl.int32), 0)
            sought = tl.where(unknown > 0, end, 0)
        else:
            sought = end
        peak = tl.full([M], float("-inf"), tl.float32)
        for begin in range(0, sought, N):
            z, _, _, _, _ = logits(q, K, begin + step, end, Index, Valid, batch, keys, size, position, exists, scale,
                                   dim, k_row, D, CAUSAL, PRECISION)  # fmt: skip
            peak = tl.maximum(peak, tl.max(z, 1))
        some = peak > float("-inf")
        tau = tl.where(some, peak, 0.0) - 1
        if Bound is not None:
            some |= known
            tau = tl.where(known, bound, tau)
        rises, steps = tl.max(some.to(tl.int32), 0), 0
        while (rises > 0) & (steps < STEPS):
            mass, slope = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
            for begin in range(0, end, N):
                z, _, _, _, _ = logits(q, K, begin + step, end, Index, Valid, batch, keys, size, position, exists,
                                       scale, dim, k_row, D, CAUSAL, PRECISION)  # fmt: skip
                weight, gradient = powers(tl.maximum(z - tau[:, None], 0.0), exponent, KIND)
                mass += tl.sum(weight, 1)
                slope += tl.sum(gradient, 1)
            rise = newton_step(mass, slope, tl.sum(exponent, 1), KIND)
            tau += rise
            rises = tl.max((rise > CLOSE * (1 + tl.abs(tau))).to(tl.int32), 0)
            steps += 1

        mass, slope = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
        count = tl.zeros([M], tl.int32)
        out = tl.zeros([M, PADDED], tl.float32)
        out_slopes = tl.zeros([M, PADDED], tl.float32)
        for begin in range(0, end, N):
            z, _, key, there, _ = logits(q, K, begin + step, end, Index, Valid, batch, keys, size, position, exists,
                                         scale, dim, k_row, D, CAUSAL, PRECISION)  # fmt: skip
            weight, gradient = powers(tl.maximum(z - tau[:, None], 0.0), exponent, KIND)
            mass += tl.sum(weight, 1)
            slope += tl.sum(gradient, 1)
            count += tl.sum((weight > 0).to(tl.int32), 1)
            v = load_rows(V, key.to(tl.int64) * v_row, there, dim, D)
            out = tl.dot(weight.to(v.dtype), v, out, input_precision=PRECISION)
            if Slopes is not None:
                out_slopes = tl.dot(gradient.to(v.dtype), v, out_slopes, input_precision=PRECISION)
        mass, slope = tl.where(some, mass, 1.0), tl.where(some, slope, 1.0)
        place, mask = row[:, None] * D + dim[None, :], inside[:, None] & (dim < D)[None, :]
        out_place = ((batch * queries + index) * heads + head)[:, None] * D + dim[None, :]
        tl.store(Out + out_place, (out / mass[:, None]).to(Out.dtype.element_ty), mask=mask)
        if Slopes is not None:
            tl.store(Slopes + place, out_slopes / slope[:, None], mask=mask)
        tl.store(Tau + row, tl.where(some, tau, float("-inf")), mask=inside)
        tl.store(Sizes + row, count, mask=inside)
