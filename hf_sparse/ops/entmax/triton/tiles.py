"""Entmax over all keys or over listed tiles of keys, for a tile of queries at a time, with nothing kept per pair.

Every sweep over the keys computes the products again: one for the largest, one for each step of Newton's method until
all rows of the program have arrived, one for the output. This serves lists of tiles, and the rows that have too many
candidates for the buffers of `rows`.

A job is one tile of queries of one list, see `hf_sparse.ops.entmax.layout`; its rows are those of all query heads that
share the list. Without lists a job is all queries of a head.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import CLOSE, STEPS, constants, load_rows, newton_step, padded, powers
from hf_sparse.ops.entmax.triton.rows import Attended
from hf_sparse.ops.entmax.triton.sweep import Blocks


class Lists(NamedTuple):
    """Hold tiles of keys for every tile of queries.

    index: `[B, H, nq, m]` int64, ascending, -1 behind the last.
    counts: `[B, H, nq]` int32, how many are listed, contiguous.
    size, rows: keys and queries of a tile.
    lead: rows of the first tile of queries that lie before the first query.
    """

    index: Tensor
    counts: Tensor
    size: int
    rows: int
    lead: int


LENGTHS = ["queries", "keys", "heads", "lists", "query_tiles", "rows", "lead", "size", "share"]


def tile_blocks(query: Tensor, rows: int) -> Blocks:
    """Return the sizes of a program for jobs of so many rows."""
    dim = padded(query.shape[3])
    most = 64 if dim <= 128 else 32
    return Blocks(min(most, max(16, triton.next_power_of_2(rows))), 64 if dim <= 128 else 32, 4, 2)


def grid_and_arguments(
    query: Tensor, key: Tensor, lists: Lists | None, rows: int
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Return the grid of programs of so many rows, and the arguments from `Index` to `share`."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if lists is None:
        arguments = (None, None, 0, 0, 0, queries, keys, heads, heads, 1, queries, 0, 1, 1)
        return (triton.cdiv(queries, rows) * batch * heads,), arguments
    number, tiles = lists.index.shape[1:3]
    share = heads // number
    strides = lists.index.stride()[:3]
    arguments = (
        lists.index, lists.counts, *strides, queries, keys, heads, number, tiles, lists.rows, lists.lead, lists.size,
        share,
    )  # fmt: skip
    return (triton.cdiv(share * lists.rows, rows) * batch * number * tiles,), arguments


def attend_tiles(
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
    into: Attended | None,
    with_slopes: bool,
    blocks: Blocks | None = None,
) -> Attended:
    """Return output and thresholds over the listed keys, or over all.

    Args:
        query, key, value, scale, exponent, kind, first, valid, causal: as in `sweep.candidates`.
        lists: the tiles of keys of each tile of queries; all keys by default.
        into: what `rows.attend_rows` returned: marked rows are written there, others are left.
        with_slopes: whether there will be a backward.
        blocks: sizes of a program.
    """
    batch, heads, queries, _ = query.shape
    job = queries if lists is None else heads // lists.index.shape[1] * lists.rows
    blocks = blocks or tile_blocks(query, job)
    if into is None:
        device = query.device
        output = torch.empty(query.shape, dtype=query.dtype, device=device)
        tau = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
        counts = torch.empty((batch, heads, queries), dtype=torch.int32, device=device)
        slopes = torch.empty(query.shape, dtype=torch.float32, device=device) if with_slopes else None
        into = Attended(output, tau, counts, None, None, slopes)
    grid, arguments = grid_and_arguments(query, key, lists, blocks.rows)
    _tiles[grid](
        query, key, value, scale, exponent, first, valid, into.marked, into.output, into.tau, into.counts, into.slopes,
        *arguments, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        **constants(query, key, kind, causal), M=blocks.rows, N=blocks.keys, num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    return into


@triton.jit
def rows_of_job(First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M: tl.constexpr):
    """Job, batch, list, head of each row, its index among the queries, position, and whether it exists."""
    blocks = tl.cdiv(share * rows, M)
    job = (tl.program_id(0) // blocks).to(tl.int64)
    tile, number, batch = job % query_tiles, job // query_tiles % lists, job // (query_tiles * lists)
    row = tl.program_id(0) % blocks * M + tl.arange(0, M)
    index = (tile * rows - lead).to(tl.int32) + row % rows
    position = tl.load(First + batch) + index
    exists = (row < share * rows) & (index >= 0) & (index < queries) & (position >= 0) & (position < keys)
    if Valid is not None:
        exists &= tl.load(Valid + batch * keys + position, mask=exists, other=0) != 0
    head = number * share + tl.minimum(row // rows, share - 1)
    inside = (row < share * rows) & (index >= 0) & (index < queries)
    return job, batch, number, tile, head, index, position, exists, inside


@triton.jit
def keys_of_slots(slot, end, Index, Valid, batch, keys, size):
    """Return the key of each slot of a list, or of all keys, and whether there is one."""
    if Index is None:
        key, there = slot, slot < end
    else:
        tile = tl.load(Index + slot // size, mask=slot < end, other=0).to(tl.int32)
        key = tile * size + slot % size
        there = (slot < end) & (key < keys)
    if Valid is not None:
        there &= tl.load(Valid + batch * keys + key, mask=there, other=0) != 0
    return key, there


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
    Q,
    K,
    V,
    Scale,
    Exponent,
    First,
    Valid,
    Marked,
    Out,
    Tau,
    Sizes,
    Slopes,
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
        scale, exponent = tl.load(Scale + head), tl.load(Exponent + head)[:, None]
        dim = tl.arange(0, PADDED)
        q = load_rows(Q, batch * q_batch + head * q_head + index.to(tl.int64) * q_row, exists, dim, D)
        last = tl.max(tl.where(exists, position, -1), 0)
        if Index is None:
            end = tl.minimum(last + 1, keys) if CAUSAL else tl.where(last >= 0, keys, 0)
        else:
            Index += batch * i_batch + number * i_list + tile * i_tile
            end = tl.where(last >= 0, tl.load(Listed + job) * size, 0)
        step = tl.arange(0, N)

        peak = tl.full([M], float("-inf"), tl.float32)
        for begin in range(0, end, N):
            z, _, _, _, _ = logits(q, K, begin + step, end, Index, Valid, batch, keys, size, position, exists, scale,
                                   dim, k_row, D, CAUSAL, PRECISION)  # fmt: skip
            peak = tl.maximum(peak, tl.max(z, 1))
        some = peak > float("-inf")
        tau = tl.where(some, peak, 0.0) - 1
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
        tl.store(Out + place, (out / mass[:, None]).to(Out.dtype.element_ty), mask=mask)
        if Slopes is not None:
            tl.store(Slopes + place, out_slopes / slope[:, None], mask=mask)
        tl.store(Tau + row, tl.where(some, tau, float("-inf")), mask=inside)
        tl.store(Sizes + row, count, mask=inside)
