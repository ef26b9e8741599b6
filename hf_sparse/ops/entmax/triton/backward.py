"""Compute the gradients of entmax attention from the thresholds that the forward pass found.

With u = [z - tau]_+, p = u ** e, U = u ** (e - 1), dp = <do, v> and delta = sum(U dp) / sum(U) = <do, slopes>:

    dz = e U (dp - delta),   de = sum(p log u (dp - delta))

Only keys with weight count. `_groups_backward` gathers them from the list that the forward pass left for a group;
`_tiles_backward` walks over all keys or listed tiles, for the groups that have no list. Both add to float32 gradients
of keys and values with atomic operations, in no fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import Numbers, constants, exponent_of, load_rows, powers, scale_of
from hf_sparse.ops.entmax.triton.groups import Attended, chunk_of
from hf_sparse.ops.entmax.triton.jobs import (
    LENGTHS,
    Lists,
    arguments_of,
    group_count,
    marked_rows,
    rows_of_group,
    rows_of_job,
)
from hf_sparse.ops.entmax.triton.sweep import GROUP_ROWS, Blocks
from hf_sparse.ops.entmax.triton.tiles import logits
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, zeros
from hf_sparse.ops.triton.sizes import padded


class Gradients(NamedTuple):
    """Hold gradients of query, key and value, and of scale and exponent for every row, `[B, Hq, Tq]`."""

    query: Tensor
    key_value: Tensor  # `[2, B, Hkv, Tk, D]` float32
    scale: Tensor | None
    exponent: Tensor | None


def backward_blocks(query: Tensor, rows: int) -> Blocks:
    """Return the sizes of a program of `_tiles_backward` for jobs of so many rows."""
    dim = padded(query.shape[3])
    most = 64 if dim <= 64 else 32 if dim <= 128 else 16
    return Blocks(min(most, padded(rows)), 64 if dim <= 64 else 32 if dim <= 128 else 16, 4, 1)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: Numbers,
    first: Tensor | None,
    valid: Tensor | None,
    causal: bool,
    lists: Lists | None,
    attended: Attended,
    d_output: Tensor,
    with_scale: bool,
    with_exponent: bool,
    marks: bool,
    blocks: Blocks | None = None,
) -> Gradients:
    """Return all gradients.

    Args:
        query, key, value, numbers, first, valid, causal, lists: as in `tiles.attend_tiles`.
        attended: what the forward pass returned, with slopes.
        d_output: `[B, Hq, Tq, D]`, the last dimension contiguous.
        with_scale, with_exponent: whether the gradients of these are wanted.
        marks: whether groups may be marked.
        blocks: sizes of a program that walks over tiles.
    """
    batch, heads, queries, _ = query.shape
    device = query.device
    d_query = empty(query.shape, query.dtype, device)
    d_key_value = zeros((2, *key.shape), torch.float32, device)
    shape = (batch, heads, queries)
    d_scale = empty(shape, torch.float32, device) if with_scale else None
    d_exponent = empty(shape, torch.float32, device) if with_exponent else None
    into = (d_query, *d_key_value, d_scale, d_exponent)
    found = Gradients(d_query, d_key_value, d_scale, d_exponent)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *d_output.stride()[:3])
    fixed = constants(query, key, numbers.kind, causal)
    assert attended.slopes is not None and attended.support is not None
    arguments = arguments_of(query, key, lists)
    groups, kept = attended.support.shape
    launch(_groups_backward, (groups,))(
        query, key, value, *numbers.arguments, first, valid, attended.support, attended.lengths, attended.tau,
        attended.slopes, d_output, *into, kept, *arguments, *strides, **fixed, M=GROUP_ROWS,
        C=max(16, chunk_of(query) // 2), num_warps=4, num_stages=1,
    )  # fmt: skip
    if not marks:
        return found
    blocks = blocks or backward_blocks(query, rows_of_job(query, lists))
    launch(_tiles_backward, (group_count(query, lists, blocks.rows),))(
        query, key, value, *numbers.arguments, first, valid, attended.lengths, attended.tau, attended.slopes, d_output,
        *into, *arguments, *strides, **fixed, M=blocks.rows, N=blocks.keys, R=GROUP_ROWS, num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    return found


@triton.jit
def _add_gradients(
    q, k, v, do, product, excess, weight, slope, delta, scale, exponent, DK, DV, key, there, shared, dim, wide,
    dq, d_scale, d_exponent, DScale, DExponent, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients of some keys and values in memory, and return the sums of the rows with what these add."""
    credit = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
    d_z = exponent * slope * credit
    scaled = (d_z * scale[:, None]).to(q.dtype)
    dq = tl.dot(scaled, k, dq, input_precision=PRECISION)
    at = shared + key.to(tl.int64)[:, None] * D + dim[None, :]
    d_k = tl.dot(tl.trans(scaled), q, input_precision=PRECISION)
    tl.atomic_add(DK + at, d_k, mask=there[:, None] & wide, sem="relaxed")
    d_v = tl.dot(tl.trans(weight.to(do.dtype)), do, input_precision=PRECISION)
    tl.atomic_add(DV + at, d_v, mask=there[:, None] & wide, sem="relaxed")
    if DScale is not None:
        d_scale += tl.sum(d_z * product, 1)
    if DExponent is not None:
        d_exponent += tl.sum(weight * tl.log(tl.maximum(excess, 1e-37)) * credit, 1)
    return dq, d_scale, d_exponent


@triton.jit
def _store_rows(DQ, DScale, DExponent, place, row, dq, d_scale, d_exponent, factor, inside, wide):
    """Write the gradients of queries, scale and exponent of the rows of a program."""
    tl.store(DQ + place, dq.to(DQ.dtype.element_ty), mask=inside[:, None] & wide)
    if DScale is not None:
        tl.store(DScale + row, d_scale * factor, mask=inside)
    if DExponent is not None:
        tl.store(DExponent + row, d_exponent, mask=inside)


@triton.jit(do_not_specialize=[*LENGTHS, "kept"])
def _groups_backward(
    Q, K, V, Scale, factor, Exponent, First, Valid, Support, Lengths, Tau, Slopes, DOut, DQ, DK, DV, DScale, DExponent,
    kept,
    Index, Listed, i_batch, i_list, i_tile, queries, keys, heads, lists, query_tiles, rows, lead, size, share,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    length = tl.load(Lengths + group)
    if length >= 0:
        _, batch, number, _, head, index, position, exists, inside = rows_of_group(
            group, Index, First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M
        )
        row = (batch * heads + head) * queries + index
        kv = number * share // GROUP
        K += batch * k_batch + kv * k_head
        V += batch * v_batch + kv * v_head
        shared = (batch * (heads // GROUP) + kv) * keys * D
        List = Support + group.to(tl.int64) * kept
        scale, exponent = scale_of(Scale, factor, head), exponent_of(Exponent, head, KIND)[:, None]
        dim, step = tl.arange(0, PADDED), tl.arange(0, C)
        wide = (dim < D)[None, :]
        q = load_rows(Q, batch * q_batch + head * q_head + index.to(tl.int64) * q_row, exists, dim, D)
        do = load_rows(DOut, batch * o_batch + head * o_head + index.to(tl.int64) * o_row, exists, dim, D)
        place = row[:, None] * D + dim[None, :]
        slopes = tl.load(Slopes + place, mask=exists[:, None] & wide, other=0.0)
        delta = tl.sum(do.to(tl.float32) * slopes, 1)
        tau = tl.load(Tau + row, mask=exists, other=0.0)
        tau = tl.where(tau > float("-inf"), tau, 0.0)  # such a row sees no key
        dq = tl.zeros([M, PADDED], tl.float32)
        d_scale, d_exponent = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
        for begin in tl.range(0, length, C, num_stages=1):
            there = begin + step < length
            key = tl.load(List + begin + step, mask=there, other=0)
            k = load_rows(K, key.to(tl.int64) * k_row, there, dim, D)
            v = load_rows(V, key.to(tl.int64) * v_row, there, dim, D)
            sees = there[None, :] & exists[:, None]
            if CAUSAL:
                sees &= key[None, :] <= position[:, None]
            product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            excess = tl.where(sees, tl.maximum(product * scale[:, None] - tau[:, None], 0.0), 0.0)
            weight, slope = powers(excess, exponent, KIND)
            dq, d_scale, d_exponent = _add_gradients(
                q, k, v, do, product, excess, weight, slope, delta, scale, exponent, DK, DV, key, there, shared,
                dim, wide, dq, d_scale, d_exponent, DScale, DExponent, D, PRECISION,
            )  # fmt: skip
        _store_rows(DQ, DScale, DExponent, place, row, dq, d_scale, d_exponent, factor, inside, wide)


@triton.jit(do_not_specialize=LENGTHS)
def _tiles_backward(
    Q, K, V, Scale, factor, Exponent, First, Valid, Lengths, Tau, Slopes, DOut, DQ, DK, DV, DScale, DExponent,
    Index, Listed, i_batch, i_list, i_tile, queries, keys, heads, lists, query_tiles, rows, lead, size, share,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    job, batch, number, tile, head, index, position, exists, inside = rows_of_group(
        tl.program_id(0), Index, First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M
    )
    row = (batch * heads + head) * queries + index
    inside &= marked_rows(tl.program_id(0), Lengths, rows, share, M, R, LEAST=-2)
    exists &= inside
    if tl.max(inside.to(tl.int32), 0) > 0:
        kv = number * share // GROUP
        K += batch * k_batch + kv * k_head
        V += batch * v_batch + kv * v_head
        shared = (batch * (heads // GROUP) + kv) * keys * D
        scale, exponent = scale_of(Scale, factor, head), exponent_of(Exponent, head, KIND)[:, None]
        dim = tl.arange(0, PADDED)
        wide = (dim < D)[None, :]
        q = load_rows(Q, batch * q_batch + head * q_head + index.to(tl.int64) * q_row, exists, dim, D)
        do = load_rows(DOut, batch * o_batch + head * o_head + index.to(tl.int64) * o_row, exists, dim, D)
        place = row[:, None] * D + dim[None, :]
        slopes = tl.load(Slopes + place, mask=exists[:, None] & wide, other=0.0)
        delta = tl.sum(do.to(tl.float32) * slopes, 1)
        tau = tl.load(Tau + row, mask=exists, other=0.0)
        tau = tl.where(tau > float("-inf"), tau, 0.0)  # such a row sees no key
        last = tl.max(tl.where(exists, position, -1), 0)
        if Index is None:
            end = tl.minimum(last + 1, keys) if CAUSAL else tl.where(last >= 0, keys, 0)
        else:
            Index += batch * i_batch + number * i_list + tile * i_tile
            end = tl.where(last >= 0, tl.load(Listed + job) * size, 0)
        step = tl.arange(0, N)
        dq = tl.zeros([M, PADDED], tl.float32)
        d_scale, d_exponent = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
        for begin in range(0, end, N):
            z, product, key, there, k = logits(q, K, begin + step, end, Index, Valid, batch, keys, size, position,
                                               exists, scale, dim, k_row, D, CAUSAL, PRECISION)  # fmt: skip
            excess = tl.maximum(z - tau[:, None], 0.0)
            if tl.max(tl.max(excess, 1), 0) > 0:
                weight, slope = powers(excess, exponent, KIND)
                v = load_rows(V, key.to(tl.int64) * v_row, there, dim, D)
                dq, d_scale, d_exponent = _add_gradients(
                    q, k, v, do, product, excess, weight, slope, delta, scale, exponent, DK, DV, key, there,
                    shared, dim, wide, dq, d_scale, d_exponent, DScale, DExponent, D, PRECISION,
                )  # fmt: skip
        _store_rows(DQ, DScale, DExponent, place, row, dq, d_scale, d_exponent, factor, inside, wide)
