"""Attend to all keys up to the query in one kernel, see `ops.causal_attention`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.triton import LOG2_E
from hf_sparse.ops.triton.launch import compile_ahead, launch
from hf_sparse.ops.triton.replay import Program, empty_like, program_of, replayed
from hf_sparse.ops.triton.sizes import padded


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute what `causal_attention` does, for tensors that `takes_kernel`, and note the launch.

    Returns:
        `[B, Hq, T, D]`, with the order of the query's dimensions in memory. It has no gradient.
    """
    (output,) = replayed(_attend, (query, key, value), scaling)
    assert output is not None
    return output


def noted_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Program | None:
    """Return the launch of `attend` for tensors of this layout at multiples of 16 bytes, if a call has noted it."""
    return program_of(_attend, (query, key, value), scaling)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor | None, ...]:
    compile_ahead(launch_attention, query, key, value, scaling)
    return (launch_attention(query, key, value, scaling),)


def launch_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Launch the kernel, as a part of what is noted elsewhere too; arguments and result as those of `attend`."""
    batch, heads, length, dim = query.shape
    output = empty_like(query)
    rows, keys, warps, stages = _sizes(query.dtype, padded(dim))
    launch(_attend_causally, (triton.cdiv(length, rows), heads, batch))(
        query, key, value, output, max(abs(scaling), 1e-30) * LOG2_E, length, dim,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        GROUP=heads // key.shape[1], PADDED=padded(dim), ROWS=rows, KEYS=keys, NEGATIVE=scaling < 0,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",  # no choice in half precision
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return output


def _sizes(dtype: torch.dtype, dim: int) -> tuple[int, int, int, int]:
    """Choose queries of a program, keys at a time, Triton's warps and stages; a program needs 64 KB at most."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if dim <= 128 else (16, 16, 4, 1)
    return (64, 64, 4, 3 if dim <= 64 else 2) if dim <= 128 else (32, 32, 4, 1)


@triton.jit
def _add_keys(
    q, K, V, start, row, column, length, dim, k_row, v_row, peak, mass, out, scale,
    KEYS: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add KEYS keys to the largest logits, softmax masses and weighted values of the queries; LAST: not all see all."""
    key = start + tl.arange(0, KEYS)
    inside = (column < dim)[None, :]
    if LAST:
        inside = inside & (key < length)[:, None]
    at = key.to(tl.int64)[:, None]
    k = tl.load(K + at * k_row + column[None, :], mask=inside, other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if LAST:
        logits = tl.where(key[None, :] <= row[:, None], logits, float("-inf"))
    top = tl.maximum(peak, tl.max(logits, 1) * scale)
    weight, shrink = tl.exp2(logits * scale - top[:, None]), tl.exp2(peak - top)
    v = tl.load(V + at * v_row + column[None, :], mask=inside, other=0.0)
    out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return top, mass * shrink + tl.sum(weight, 1), out


@triton.jit(do_not_specialize=["length"])
def _attend_causally(
    Q, K, V, Out, scale, length, dim, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with ROWS queries of a head; programs with more keys begin first, for they take longer."""
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // GROUP * k_head
    V += batch * v_batch + head // GROUP * v_head
    Out += batch * o_batch + head * o_head
    row, column = begin + tl.arange(0, ROWS), tl.arange(0, PADDED)
    there = (row < length)[:, None] & (column < dim)[None, :]
    q = tl.load(Q + row.to(tl.int64)[:, None] * q_row + column[None, :], mask=there, other=0.0)
    if NEGATIVE:  # the maximum of scaled logits is taken before they are scaled
        q = -q
    peak = tl.full([ROWS], -3.0e38, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    seen_by_all = begin // KEYS * KEYS
    for start in range(0, seen_by_all, KEYS):
        peak, mass, out = _add_keys(
            q, K, V, start, row, column, length, dim, k_row, v_row, peak, mass, out, scale, KEYS, False, PRECISION
        )
    for start in range(seen_by_all, tl.minimum(begin + ROWS, length), KEYS):
        peak, mass, out = _add_keys(
            q, K, V, start, row, column, length, dim, k_row, v_row, peak, mass, out, scale, KEYS, True, PRECISION
        )
    out /= mass[:, None]
    to = row.to(tl.int64)[:, None] * o_row + column[None, :]
    tl.store(Out + to, out.to(Out.dtype.element_ty), mask=there)
