"""Entmax over the candidates of each row: the threshold, the weights, and the values of the keys that have one.

One program of one warp per row. It writes the candidates out as a list of keys, gathers these for their products, finds
tau, keeps the keys whose weight is positive, and gathers their values. Rows with more candidates than the buffers take
are marked and left to the kernel in `tiles`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import CLOSE, STEPS, constants, newton_step, ones_of, powers
from hf_sparse.ops.entmax.triton.sweep import Candidates


class Attended(NamedTuple):
    """Hold the result of a forward pass.

    output: `[B, Hq, Tq, D]`.
    tau: `[B, Hq, Tq]` float32, `-inf` for a row without a key.
    counts: `[B, Hq, Tq]` int32, keys with weight.
    support: `[rows, most]` int32, the keys with weight of a row, not of one that is marked.
    marked: `[rows]` int32, 1 where the buffers did not take all candidates.
    slopes: `[B, Hq, Tq, D]` float32, values averaged with `[z - tau]_+ ** (e - 1)`, for the backward.
    """

    output: Tensor
    tau: Tensor
    counts: Tensor
    support: Tensor | None
    marked: Tensor | None
    slopes: Tensor | None


LENGTHS = ["queries", "heads", "capacity", "most"]


def chunk_of(dim: int) -> int:
    """Return how many keys a program gathers at a time."""
    return 32 if dim <= 64 else 16


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    exponent: Tensor,
    kind: int,
    found: Candidates,
    most: int,
    with_slopes: bool,
    warps: int = 1,
    chunk: int | None = None,
    dot: bool = True,
) -> Attended:
    """Return output and thresholds of all rows whose candidates fit into the buffers.

    Args:
        query, key, value, scale, exponent, kind: as in `sweep.candidates`.
        found: the candidates.
        most: keys per row that the list of candidates takes; at most as many as there are words for a row.
        with_slopes: whether there will be a backward.
        warps, chunk: of a program.
    """
    batch, heads, queries, _ = query.shape
    rows, capacity, words = found.words.shape
    device = query.device
    output = torch.empty(query.shape, dtype=query.dtype, device=device)
    tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    counts = torch.empty((batch, heads, queries), dtype=torch.int32, device=device)
    support = torch.empty((rows, most), dtype=torch.int32, device=device)
    marked = torch.empty(rows, dtype=torch.int32, device=device)
    slopes = torch.empty(query.shape, dtype=torch.float32, device=device) if with_slopes else None
    # The products of a row take the place of its words, which are no longer needed then.
    products = found.words.view(torch.float32).view(rows, -1)
    if products.shape[1] < most:
        products = torch.empty((rows, most), dtype=torch.float32, device=device)
    fixed = constants(query, key, kind, True)
    del fixed["CAUSAL"], fixed["PRECISION"]
    _rows[(rows,)](
        query, key, value, scale, exponent, found.words, found.blocks, found.counts, products, support, marked, output,
        tau, counts, slopes, queries, heads, capacity, most, products.stride(0), *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], **fixed, W=words, C=chunk or chunk_of(fixed["PADDED"]), DOT=query.dtype != torch.float32 and dot, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return Attended(output, tau, counts, support, marked, slopes)


@triton.jit
def listed_keys(Words, Numbers, Support, blocks, most, W: tl.constexpr):
    """Write the candidates of a row to `Support` in ascending order, and return how many there are."""
    total = 0
    for begin in range(0, blocks * W, 32):
        number = begin + tl.arange(0, 32)
        word = tl.load(Words + number, mask=number < blocks * W, other=0).to(tl.uint32, bitcast=True)
        block = tl.load(Numbers + number // W, mask=number < blocks * W, other=0)
        key = (block * W + number % W) * 32
        ones = ones_of(word)
        place = total + tl.cumsum(ones, 0) - ones
        total += tl.sum(ones, 0)
        while tl.max(word, 0) > 0:
            rest = word & (word - 1)  # without the lowest bit
            lane = ones_of((word ^ rest) - 1)
            tl.store(Support + place, key + lane, mask=(word != 0) & (place < most))
            place += 1
            word = tl.where(word == 0, word, rest)
    return total


@triton.jit(do_not_specialize=LENGTHS)
def _rows(
    Q,
    K,
    V,
    Scale,
    Exponent,
    Words,
    Numbers,
    Counts,
    Products,
    Support,
    Marked,
    Out,
    Tau,
    Sizes,
    Slopes,
    queries,
    heads,
    capacity,
    most,
    stride,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair, index = row // queries, row % queries
    batch, head = pair // heads, pair % heads
    K += batch * k_batch + head // GROUP * k_head
    V += batch * v_batch + head // GROUP * v_head
    Support += row * most
    Products += row * stride
    scale, exponent = tl.load(Scale + head), tl.load(Exponent + head)
    dim = tl.arange(0, PADDED)
    blocks = tl.load(Counts + row)
    total = most + 1
    if blocks <= capacity:
        total = listed_keys(Words + row * capacity * W, Numbers + row * capacity, Support, blocks, most, W)
    tl.store(Marked + row, (total > most).to(tl.int32))
    if total <= most:
        q = tl.load(Q + batch * q_batch + head * q_head + index * q_row + dim, mask=dim < D, other=0.0)
        lane = tl.arange(0, 16)
        queries_16 = tl.where(lane[None, :] == 0, q[:, None], 0.0).to(q.dtype)  # a product takes 16 columns
        q = q.to(tl.float32)
        tl.debug_barrier()  # the list is written, the words have been read
        step = tl.arange(0, C)
        peak = float("-inf")
        for begin in range(0, total, C):
            slot = begin + step
            key = tl.load(Support + slot, mask=slot < total, other=0).to(tl.int64)
            inside = (slot < total)[:, None] & (dim < D)[None, :]
            k = tl.load(K + key[:, None] * k_row + dim[None, :], mask=inside, other=0.0)
            if DOT:
                z = tl.sum(tl.dot(k, queries_16), 1) * scale
            else:
                z = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
            tl.store(Products + slot, z, mask=slot < total)
            peak = tl.maximum(peak, tl.max(tl.where(slot < total, z, float("-inf")), 0))
        tl.debug_barrier()

        some = total > 0
        tau = tl.where(some, peak, 0.0) - 1
        wide = tl.arange(0, 128)
        rise, steps = tl.where(some, 1.0, 0.0), 0
        mass, slope = 0.0, 0.0
        while (rise > CLOSE * (1 + tl.abs(tau))) & (steps < STEPS):
            mass, slope = 0.0, 0.0
            for begin in range(0, total, 128):
                slot = begin + wide
                z = tl.load(Products + slot, mask=slot < total, other=float("-inf"))
                weights, gradients = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
                mass += tl.sum(weights, 0)
                slope += tl.sum(gradients, 0)
            rise = newton_step(mass, slope, exponent, KIND)
            tau += rise
            steps += 1

        # The keys with weight move to the front of the list.
        size = 0
        mass, slope = 0.0, 0.0
        for begin in range(0, total, 128):
            slot = begin + wide
            z = tl.load(Products + slot, mask=slot < total, other=float("-inf"))
            key = tl.load(Support + slot, mask=slot < total, other=0)
            excess = tl.maximum(z - tau, 0.0)
            weights, gradients = powers(excess, exponent, KIND)
            mass += tl.sum(weights, 0)
            slope += tl.sum(gradients, 0)
            has = (weights > 0).to(tl.int32)
            place = size + tl.cumsum(has, 0) - has
            size += tl.sum(has, 0)
            tl.debug_barrier()
            tl.store(Products + place, excess, mask=has > 0)
            tl.store(Support + place, key, mask=has > 0)
        tl.debug_barrier()

        mass, slope = 1 / tl.where(some, mass, 1.0), 1 / tl.where(some, slope, 1.0)
        out = tl.zeros([16 if DOT else C, PADDED], tl.float32)
        out_slopes = tl.zeros([C, PADDED], tl.float32)
        for begin in range(0, size, C):
            slot = begin + step
            key = tl.load(Support + slot, mask=slot < size, other=0).to(tl.int64)
            excess = tl.load(Products + slot, mask=slot < size, other=0.0)
            weights, gradients = powers(excess, exponent, KIND)
            inside = (slot < size)[:, None] & (dim < D)[None, :]
            v = tl.load(V + key[:, None] * v_row + dim[None, :], mask=inside, other=0.0)
            if DOT:  # the weights in row 0, their slopes in row 1
                both = tl.where(lane[:, None] == 0, (weights * mass)[None, :], 0.0)
                both = tl.where(lane[:, None] == 1, (gradients * slope)[None, :], both)
                out = tl.dot(both.to(v.dtype), v, out)
            else:
                out += v.to(tl.float32) * (weights * mass)[:, None]
                if Slopes is not None:
                    out_slopes += v.to(tl.float32) * (gradients * slope)[:, None]
        if DOT:
            out_slopes = tl.sum(tl.where(lane[:, None] == 1, out, 0.0), 0)
            out = tl.sum(tl.where(lane[:, None] == 0, out, 0.0), 0)
        else:
            out_slopes = tl.sum(out_slopes, 0)
            out = tl.sum(out, 0)
        tl.store(Out + row * D + dim, out.to(Out.dtype.element_ty), mask=dim < D)
        if Slopes is not None:
            tl.store(Slopes + row * D + dim, out_slopes, mask=dim < D)
        tl.store(Tau + row, tl.where(some, tau, float("-inf")))
        tl.store(Sizes + row, size)
