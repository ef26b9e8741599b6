"""Compute the output of SparseK attention in one kernel.

One program per block of rows (see `walk`) gathers the keys of its list and of its window, with one online softmax over
all of them. Everything is accumulated in float32; float32 inputs are multiplied as three products of TF32, which loses
hardly more than float32 itself. A gate multiplies the weight after the exponential, so it may be 0.

Programs begin with the end of the text, for all heads: those of its beginning have fewer keys, and fill what is left of
the GPU at the end. That matters while a text has few programs for each multiprocessor.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.selection.triton.lists import ALWAYS, Tables
from hf_sparse.ops.selection.triton.program_sizes import ProgramSizes, forward_sizes
from hf_sparse.ops.selection.triton.walk import (
    consecutive,
    front_keys,
    gates,
    gather,
    hide_ends,
    listed,
    listed_gates,
    mixed,
    reach,
    rest_and_leavers,
    rows_of,
)
from hf_sparse.ops.triton import LOG2_E
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, empty_like
from hf_sparse.ops.triton.sizes import padded

# No length is worth a compilation of its own.
LENGTHS = ["queries", "keys", "heads", "width", "tiles", "tile", "left", "right", "sinks"]


def lengths(query: Tensor, key: Tensor, tables: Tables) -> tuple[int, ...]:
    """Return the arguments of a kernel that are named in `LENGTHS`, in that order."""
    tiles, width = tables.lists.shape[-2:]
    window = (tables.left, tables.right)
    return query.shape[2], key.shape[2], key.shape[1], width, tiles, tables.tile, *window, tables.sinks


def constants(query: Tensor, key: Tensor, scores: Tensor | None, tables: Tables) -> dict[str, Any]:
    """Return the constants that a kernel is compiled for, besides its sizes."""
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "D": query.shape[3],
        "PADDED": padded(query.shape[3]),
        "SOFT": scores is not None,
        "CAUSAL": tables.begin is None,
        "ALWAYS": ALWAYS,
        "TILE": triton.next_power_of_2(tables.tile) if tables.begin is None else 1,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",  # no choice in half precision
    }


def mixed_stages(blocks: ProgramSizes, tables: Tables) -> int:
    """Return the pipeline stages of the loop over the mixed keys.

    In causal order these keys are few: the registers that fetching them ahead takes are needed by the other loops."""
    return 1 if tables.begin is None else blocks.stages


def far(*tensors: Tensor) -> bool:
    """Tell whether offsets of rows within a head of `[B, H, T, D]` need more than 31 bits."""
    return any(x.shape[2] * x.stride(2) >= 1 << 31 for x in tensors)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor | None,
    tau: Tensor | None,
    tables: Tables,
    scaling: float,
    blocks: ProgramSizes | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and, for every row, the base-2 logarithm of its softmax mass, 0 without a key.

    The logarithms are `[B, Hkv, Tq, group]` float32: in this order the rows of a program lie side by side.

    Arguments as in `attention.attend_listed`; `scores` and `tau` contiguous, the last dimension of the others too.
    """
    batch, heads, queries, _ = query.shape
    blocks = blocks or forward_sizes(query, scores is not None, tables.begin is None)
    output = empty_like(query)
    group = heads // key.shape[1]
    lse = empty((batch, key.shape[1], queries, group), torch.float32, query.device)
    launch(_forward, (triton.cdiv(queries * group, blocks.rows) * key.shape[1], batch))(
        query,
        key,
        value,
        scores,
        tau,
        tables.begin,
        tables.until,
        tables.lists,
        tables.leavers,
        tables.bounds,
        tables.scores,
        tables.ends,
        tables.first,
        output,
        lse,
        max(abs(scaling), 1e-30) * LOG2_E,  # not 0, which a masked logit could not be multiplied by
        *lengths(query, key, tables),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *output.stride()[:3],
        **constants(query, key, scores, tables),
        M=blocks.rows,
        N=blocks.keys,
        MIXED_STAGES=mixed_stages(blocks, tables),
        NEGATIVE=scaling < 0,
        WIDE=far(key, value),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        maxnreg=blocks.registers,
    )
    return output, lse


@triton.jit
def _weigh(logits, peak, scale):
    """Return each row's largest scaled logit so far, weights against it, and the factor for the sums before it."""
    top = tl.maximum(peak, tl.max(logits, 1) * scale)
    return top, tl.exp2(logits * scale - top[:, None]), tl.exp2(peak - top)


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    Q, K, V, Z, Tau, Begin, Until, Lists, Leavers, Bounds, Scores, Ends, First, Out, Lse, scale, queries, keys, heads,
    width, tiles, tile, left, right, sinks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SOFT: tl.constexpr,
    CAUSAL: tl.constexpr, ALWAYS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, MIXED_STAGES: tl.constexpr,
    NEGATIVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head, batch = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(1).to(tl.int64)
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    row = batch * heads + head  # of [B, Hkv]
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    flat, query, member, exists, t_first, t_last = rows_of(block, queries, GROUP, M)
    dim = tl.arange(0, PADDED)
    inside = exists[:, None] & (dim < D)[None, :]
    q_rows = batch * q_batch + (head * GROUP + member) * q_head + query.to(tl.int64) * q_row
    q = tl.load(Q + q_rows[:, None] + dim[None, :], mask=inside, other=0.0)
    if NEGATIVE:  # the maximum of scaled logits is taken before they are scaled
        q = -q

    tables, position, tau, first, front, live, gone, begin, full_begin, full_end, end = reach(
        row, batch, query, exists, t_first, t_last, Z, Tau, Begin, Until, Lists, Leavers, Bounds, Scores, Ends, First,
        queries, keys, width, tiles, tile, left, right, sinks, SOFT, CAUSAL, TILE,
    )  # fmt: skip
    Z, Begin, Until, Lists, Leavers, Scores, Ends = tables
    front = front // N * N
    taken = (full_end - full_begin) // N * N

    peak = tl.full([M], -3.0e38, tl.float32)
    mass = tl.zeros([M], tl.float32)
    out = tl.zeros([M, PADDED], tl.float32)
    step = tl.arange(0, N)

    for start in range(0, front, N):
        key = front_keys(start, Lists, first, sinks, N)
        k = gather(K, key, key >= 0, k_row, D, PADDED, False, WIDE)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        peak, weight, shrink = _weigh(logits, peak, scale)
        mass = mass * shrink + tl.sum(weight, 1)
        v = gather(V, key, key >= 0, v_row, D, PADDED, False, WIDE)
        out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)

    if CAUSAL and not SOFT:
        low = t_first + keys - queries
        for start in range(0, end - begin, N):
            at = begin + start
            k = consecutive(K, at, k_row, end, N, D, PADDED, True)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            logits = hide_ends(logits, at, position, full_begin, low, end, Until, N)
            peak, weight, shrink = _weigh(logits, peak, scale)
            mass = mass * shrink + tl.sum(weight, 1)
            v = consecutive(V, at, v_row, end, N, D, PADDED, True)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        for start in tl.range(0, live - front + gone, N, num_stages=MIXED_STAGES):
            key, sees = rest_and_leavers(
                start + step, position, front, live, gone, Until, Lists, Leavers, first, sinks, width, keys
            )
            there = key >= 0
            k = gather(K, key, there, k_row, D, PADDED, True, WIDE)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            peak, weight, shrink = _weigh(tl.where(sees, logits, float("-inf")), peak, scale)
            mass = mass * shrink + tl.sum(weight, 1)
            v = gather(V, key, there, v_row, D, PADDED, True, WIDE)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    else:
        for start in range(0, taken, N):
            k = consecutive(K, full_begin + start, k_row, end, N, D, PADDED, False)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            peak, weight, shrink = _weigh(logits, peak, scale)
            mass = mass * shrink + tl.sum(weight, 1)
            v = consecutive(V, full_begin + start, v_row, end, N, D, PADDED, False)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        right_begin = full_begin + taken

        if SOFT and CAUSAL:
            for start in range(tl.maximum(front, sinks), live, N):
                slot = start + step
                key = tl.maximum(listed(slot, live, Lists, first, sinks, width, keys), 0)
                gate, _ = listed_gates(slot, live, Scores, Ends, sinks, width, position, tau)
                k = gather(K, key, key >= 0, k_row, D, PADDED, False)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                peak, weight, shrink = _weigh(tl.where(gate > 0, logits, float("-inf")), peak, scale)
                weight *= gate
                mass = mass * shrink + tl.sum(weight, 1)
                v = gather(V, key, key >= 0, v_row, D, PADDED, False)
                out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
            live = tl.maximum(tl.minimum(live, sinks), front)

        rest = live - front + gone + full_begin - begin + end - right_begin
        for start in tl.range(0, rest, N, num_stages=MIXED_STAGES):
            key, sees = mixed(
                start + step, position, front, live, gone, begin, full_begin, right_begin, end, Begin, Until, Lists,
                Leavers, first, sinks, width, keys, ALWAYS, CAUSAL,
            )  # fmt: skip
            there = key >= 0
            k = gather(K, key, there, k_row, D, PADDED, True)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            peak, weight, shrink = _weigh(tl.where(sees, logits, float("-inf")), peak, scale)
            if SOFT:
                z = tl.load(Z + key, mask=there, other=0.0)[None, :]
                gate, _ = gates(position, tau, key[None, :], z, left, right)
                weight = tl.where(sees, weight * gate, 0.0)
            mass = mass * shrink + tl.sum(weight, 1)
            v = gather(V, key, there, v_row, D, PADDED, True)
            out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)

    some = mass > 0
    out *= tl.where(some, 1.0 / tl.where(some, mass, 1.0), 0.0)[:, None]
    o_rows = batch * o_batch + (head * GROUP + member) * o_head + query.to(tl.int64) * o_row
    tl.store(Out + o_rows[:, None] + dim[None, :], out.to(Out.dtype.element_ty), mask=inside)
    lse = tl.where(some, peak + tl.log2(tl.where(some, mass, 1.0)), 0.0)
    tl.store(Lse + row * queries * GROUP + flat, lse, mask=exists)
