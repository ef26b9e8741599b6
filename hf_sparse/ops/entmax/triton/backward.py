"""Gradients of entmax attention, from the thresholds that the forward pass found.

With u = [z - tau]_+, p = u ** e, U = u ** (e - 1), dp = <do, v> and delta = sum(U dp) / sum(U) = <do, slopes>:

    dz = e U (dp - delta),   de = sum(p log u (dp - delta))

Only keys with weight count. `_rows_backward` gathers them from the list that the forward pass left; `_tiles_backward`
walks over all keys or listed tiles, for lists and for the rows that have no list. Both add to float32 gradients of keys
and values with atomic operations, in no fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import constants, load_rows, padded, powers
from hf_sparse.ops.entmax.triton.rows import Attended, chunk_of
from hf_sparse.ops.entmax.triton.sweep import Blocks
from hf_sparse.ops.entmax.triton.tiles import LENGTHS, Lists, grid_and_arguments, logits, rows_of_job


class Gradients(NamedTuple):
    """Hold gradients of query, key and value, and of scale and exponent for every row, `[B, Hq, Tq]`."""

    query: Tensor
    key: Tensor  # float32
    value: Tensor  # float32
    scale: Tensor | None
    exponent: Tensor | None


def backward_blocks(query: Tensor, rows: int) -> Blocks:
    """Return the sizes of a program of `_tiles_backward` for jobs of so many rows."""
    dim = padded(query.shape[3])
    most = 64 if dim <= 64 else 32 if dim <= 128 else 16
    return Blocks(min(most, max(16, triton.next_power_of_2(rows))), 64 if dim <= 64 else 32 if dim <= 128 else 16, 4, 1)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    exponent: Tensor,
    kind: int,
    first: Tensor,
    valid: Tensor | None,
    causal: bool,
    lists: Lists | None,
    attended: Attended,
    d_output: Tensor,
    with_scale: bool,
    with_exponent: bool,
    blocks: Blocks | None = None,
    warps: int = 1,
) -> Gradients:
    """Return all gradients.

    Args:
        query, key, value, scale, exponent, kind, first, valid, causal, lists: as in `tiles.attend_tiles`.
        attended: what the forward pass returned, with slopes.
        d_output: `[B, Hq, Tq, D]`, the last dimension contiguous.
        with_scale, with_exponent: whether the gradients of these are wanted.
        blocks: sizes of a program that walks over tiles.
        warps: of a program that gathers the keys of a row.
    """
    batch, heads, queries, _ = query.shape
    device = query.device
    d_query = torch.empty(query.shape, dtype=query.dtype, device=device)
    d_key = torch.zeros(key.shape, dtype=torch.float32, device=device)
    d_value = torch.zeros(value.shape, dtype=torch.float32, device=device)
    shape = (batch, heads, queries)
    d_scale = torch.empty(shape, dtype=torch.float32, device=device) if with_scale else None
    d_exponent = torch.empty(shape, dtype=torch.float32, device=device) if with_exponent else None
    into = (d_query, d_key, d_value, d_scale, d_exponent)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *d_output.stride()[:3])
    fixed = constants(query, key, kind, causal)
    if attended.support is not None:
        rows, most = attended.support.shape
        some = {name: fixed[name] for name in ("GROUP", "D", "PADDED", "KIND")}
        _rows_backward[(rows,)](
            query, key, value, scale, exponent, attended.support, attended.marked, attended.counts, attended.tau,
            attended.slopes, d_output, *into, queries, heads, key.shape[2], most, *strides, **some,
            C=chunk_of(fixed["PADDED"]) // 2, num_warps=warps, num_stages=1,
        )  # fmt: skip
    job = queries if lists is None else heads // lists.index.shape[1] * lists.rows
    blocks = blocks or backward_blocks(query, job)
    grid, arguments = grid_and_arguments(query, key, lists, blocks.rows)
    _tiles_backward[grid](
        query, key, value, scale, exponent, first, valid, attended.marked, attended.tau, attended.slopes, d_output,
        *into, *arguments, *strides, **fixed, M=blocks.rows, N=blocks.keys, num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    return Gradients(*into)


@triton.jit(do_not_specialize=["queries", "heads", "keys", "most"])
def _rows_backward(
    Q,
    K,
    V,
    Scale,
    Exponent,
    Support,
    Marked,
    Sizes,
    Tau,
    Slopes,
    DOut,
    DQ,
    DK,
    DV,
    DScale,
    DExponent,
    queries,
    heads,
    keys,
    most,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(Marked + row) == 0:
        pair, index = row // queries, row % queries
        batch, head = pair // heads, pair % heads
        kv = head // GROUP
        K += batch * k_batch + kv * k_head
        V += batch * v_batch + kv * v_head
        shared = (batch * (heads // GROUP) + kv) * keys * D
        size, tau = tl.load(Sizes + row), tl.load(Tau + row)
        scale, exponent = tl.load(Scale + head), tl.load(Exponent + head)
        dim = tl.arange(0, PADDED)
        wide = dim < D
        q = tl.load(Q + batch * q_batch + head * q_head + index * q_row + dim, mask=wide, other=0.0).to(tl.float32)
        do = tl.load(DOut + batch * o_batch + head * o_head + index * o_row + dim, mask=wide, other=0.0).to(tl.float32)
        delta = tl.sum(do * tl.load(Slopes + row * D + dim, mask=wide, other=0.0), 0)
        step = tl.arange(0, C)
        dq = tl.zeros([C, PADDED], tl.float32)
        d_scale, d_exponent = 0.0, 0.0
        for begin in range(0, size, C):
            slot = begin + step
            there = slot < size
            key = tl.load(Support + row * most + slot, mask=there, other=0).to(tl.int64)
            inside = there[:, None] & wide[None, :]
            k = tl.load(K + key[:, None] * k_row + dim[None, :], mask=inside, other=0.0).to(tl.float32)
            v = tl.load(V + key[:, None] * v_row + dim[None, :], mask=inside, other=0.0).to(tl.float32)
            product = tl.sum(k * q[None, :], 1)
            excess = tl.where(there, tl.maximum(product * scale - tau, 0.0), 0.0)
            weight, slope = powers(excess, exponent, KIND)
            credit = tl.sum(v * do[None, :], 1) - delta
            d_z = exponent * slope * credit
            dq += k * (d_z * scale)[:, None]
            place = shared + key[:, None] * D + dim[None, :]
            tl.atomic_add(DK + place, (d_z * scale)[:, None] * q[None, :], mask=inside, sem="relaxed")
            tl.atomic_add(DV + place, weight[:, None] * do[None, :], mask=inside, sem="relaxed")
            if DScale is not None:
                d_scale += tl.sum(d_z * product, 0)
            if DExponent is not None:
                logarithm = tl.log(tl.maximum(excess, 1e-37))
                d_exponent += tl.sum(weight * logarithm * credit, 0)
        tl.store(DQ + row * D + dim, tl.sum(dq, 0).to(DQ.dtype.element_ty), mask=wide)
        if DScale is not None:
            tl.store(DScale + row, d_scale)
        if DExponent is not None:
            tl.store(DExponent + row, d_exponent)


@triton.jit(do_not_specialize=LENGTHS)
def _tiles_backward(
    Q,
    K,
    V,
    Scale,
    Exponent,
    First,
    Valid,
    Marked,
    Tau,
    Slopes,
    DOut,
    DQ,
    DK,
    DV,
    DScale,
    DExponent,
    Index,
    Listed,
    i_batch,
    i_list,
    i_tile,
    queries,
    keys,
    heads,
    lists,
    query_tiles,
    rows,
    lead,
    size,
    share,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    job, batch, number, tile, head, index, position, exists, inside = rows_of_job(
        First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M
    )
    row = (batch * heads + head) * queries + index
    if Marked is not None:
        inside &= tl.load(Marked + row, mask=inside, other=0) != 0
        exists &= inside
    if tl.max(inside.to(tl.int32), 0) > 0:
        kv = number * share // GROUP
        K += batch * k_batch + kv * k_head
        V += batch * v_batch + kv * v_head
        shared = (batch * (heads // GROUP) + kv) * keys * D
        scale, exponent = tl.load(Scale + head), tl.load(Exponent + head)[:, None]
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
        tl.store(DQ + place, dq.to(DQ.dtype.element_ty), mask=inside[:, None] & wide)
        if DScale is not None:
            tl.store(DScale + row, d_scale, mask=inside)
        if DExponent is not None:
            tl.store(DExponent + row, d_exponent, mask=inside)
