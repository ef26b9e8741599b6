"""Take a decoding step of exact entmax attention in two kernels: every key is read once, and few values are.

`_products` splits the keys over programs. A program multiplies its share with all query heads of a KV head, or of a
list of tiles, and keeps the products in float32, with the greatest of every block of keys. `_attend` has a program for
each row. tau over the greatest products of the blocks is never above tau over all, so only blocks that pass it are
looked at again, and of their keys those that pass it are written out side by side. Over these tau is found, and the
values of the keys with weight are added up.

Lengths are numbers that no kernel is compiled for, and positions may lie on the device alone, so a step can be captured
in a CUDA graph and replayed while a text grows in a cache of fixed size.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import (
    CLOSE,
    STEPS,
    exponent_of,
    load_rows,
    newton_step,
    origin_of,
    powers,
    precision_of,
)
from hf_sparse.ops.triton.sizes import padded

BLOCK = 64  # keys that a program of `_products` takes at a time
PROGRAMS = 512  # of `_products`: about four for each multiprocessor of a large GPU
WIDE = 1024  # products that a program of `_attend` holds at a time
GATHERED = 64  # values that it holds at a time
STAGES = 3  # of Triton, in the loop over the keys
ROUNDED = 1024  # a row of the buffer has a multiple of so many products: a growing text asks for few sizes
ALIGNED = 16  # bytes of addresses, elements of strides

_FIRST_STEPS = tl.constexpr(4)  # of Newton's method over the greatest products of the blocks
_MARGIN = tl.constexpr(4e-6)  # more than the rounding of a lower bound

_compiled: dict[Hashable, Any] = {}  # kernels by all that they are compiled for: Triton would look at every argument


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    exponent: Tensor | None,
    kind: int,
    factor: float,
    is_log: bool,
    causal: bool,
    valid: Tensor | None,
    first: Tensor | None,
    index: Tensor | None,
    size: int,
    *,
    block: int = BLOCK,
    programs: int = PROGRAMS,
    wide: int = WIDE,
    gathered: int = GATHERED,
    stages: int = STAGES,
) -> Tensor:
    """Return the output `[B, Hq, Tq, D]`, contiguous.

    Args:
        query, key, value, scale, exponent, kind, factor, is_log, causal, valid, first, index, size: as in
            `hf_sparse.ops.entmax.step._plain`.
        block, programs, stages: keys at a time, programs and Triton's stages of the kernel that multiplies.
        wide, gathered: products and values at a time of the kernel of the rows; `wide` is a multiple of `block`.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    lists, tiles, slots, i_batch, i_list, i_tile = kv_heads, 0, keys, 0, 0, 0
    if index is not None:
        lists, tiles, slots = max(kv_heads, index.shape[1]), index.shape[3], index.shape[3] * size
        i_batch, i_list = (index.stride(place) if index.shape[place] > 1 else 0 for place in (0, 1))
        i_tile = index.stride(3)
    share = heads // lists
    rows = batch * heads * queries
    room = max(1, triton.cdiv(slots, ROUNDED)) * ROUNDED
    width = 2 * (room + room // block)
    scratch = torch.empty(rows * width, dtype=torch.float32, device=query.device)
    output = torch.empty((batch, heads, queries, dim), dtype=query.dtype, device=query.device)
    k_strides, v_strides = key.stride()[:3], value.stride()[:3]
    numbers = (*k_strides, *v_strides, key.data_ptr(), value.data_ptr())
    align = 1 if any(number % ALIGNED for number in numbers) else ALIGNED
    if align > 1:
        k_strides, v_strides = (tuple(number // align for number in part) for part in (k_strides, v_strides))
    splits = max(1, min(triton.cdiv(slots, block), triton.cdiv(programs, batch * lists)))
    f_batch = 0 if first is None or first.numel() == 1 else 1
    listed = (first, index, scratch, queries, keys, heads, room, width, f_batch, i_batch, i_list, i_tile, tiles, size)
    group, wide_dim = heads // kv_heads, padded(dim)
    members = max(16, triton.next_power_of_2(share * queries))
    shared = (group, share, dim, wide_dim, causal, align, block)
    device = query.device
    dtypes = (query.dtype, scale.dtype, *(None if part is None else part.dtype for part in (exponent, valid, first)))
    family = (device.index, dtypes, index is None)
    _launch(
        _products, (splits, lists, batch), family, 4,
        (*listed, query, key, scale, valid, float(factor), *query.stride()[:3], *k_strides,
         0 if valid is None else valid.stride(0)),
        (*shared, is_log, members, precision_of(query.dtype), stages),
    )  # fmt: skip
    _launch(
        _attend, (rows, 1, 1), family, 4,
        (*listed, value, exponent, output, *v_strides),
        (*shared, kind, wide, gathered),
    )  # fmt: skip
    return output


def _launch(
    kernel: Any, grid: tuple[int, int, int], family: Hashable, warps: int, arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
) -> None:  # fmt: skip
    """Launch a kernel; from the second time on without Triton's look at what all arguments are.

    Args:
        grid: programs along each dimension.
        family: all that is not in `constants` and decides which binary is right.
        warps: of a program.
        arguments: of the kernel, and `constants` behind them.
    """
    name = (kernel, family, constants)
    compiled = _compiled.get(name)
    if compiled is not None:
        compiled[grid](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, *constants, num_warps=warps)
    if compiled is not None:  # not so in Triton's interpreter
        _compiled[name] = compiled


_NUMBERS = ["queries", "keys", "heads", "room", "width", "f_batch", "i_batch", "i_list", "i_tile", "tiles", "size"]
_STRIDES = ["factor", "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "m_batch"]
_ADDRESSES = ["First", "Index", "Scratch", "Q", "Scale", "Valid"]


@triton.jit(do_not_specialize=[*_NUMBERS, *_STRIDES], do_not_specialize_on_alignment=_ADDRESSES)
def _products(
    First,
    Index,
    Scratch,
    queries,
    keys,
    heads,
    room,
    width,
    f_batch,
    i_batch,
    i_list,
    i_tile,
    tiles,
    size,
    Q,
    K,
    Scale,
    Valid,
    factor,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    m_batch,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    number, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = origin_of(First, batch * f_batch, queries, keys).to(tl.int32)
    lane, dim, step = tl.arange(0, M), tl.arange(0, PADDED), tl.arange(0, N)
    head, index = number * SHARE + lane // queries, lane % queries
    inside = lane < SHARE * queries
    position = first + index
    exists = inside & (position >= 0) & (position < keys)
    if Valid is not None:
        exists &= tl.load(Valid + batch * m_batch + position, mask=exists, other=0) != 0
    scale = tl.load(Scale + head, mask=inside, other=0.0).to(tl.float32)
    scale = factor * (tl.exp(scale) if LOG else scale)
    q = load_rows(Q, batch * q_batch + head.to(tl.int64) * q_head + index * q_row, inside, dim, D)
    K += (batch * k_batch + (number * SHARE // GROUP).to(tl.int64) * k_head) * ALIGN
    row = (batch * heads + head) * queries + index
    products = Scratch + row * width
    greatest = products + 2 * room
    end = _slots(first, queries, keys, tiles, size, Index, CAUSAL)
    blocks = tl.cdiv(end, N)
    share = tl.cdiv(blocks, tl.num_programs(0))
    begin = tl.program_id(0) * share
    for block in tl.range(begin, tl.minimum(begin + share, blocks), num_stages=STAGES):
        slot = block * N + step
        key, there = slot, slot < end
        if Index is not None:
            tile = tl.load(
                Index + batch * i_batch + number * i_list + slot // size * i_tile, mask=there, other=-1
            ).to(tl.int32)  # fmt: skip
            key = tile * size + slot % size
            there &= (tile >= 0) & (key < keys)
        if Valid is not None:
            there &= tl.load(Valid + batch * m_batch + key, mask=there, other=0) != 0
        k = tl.load(
            K + (key.to(tl.int64) * k_row * ALIGN)[:, None] + dim[None, :],
            mask=there[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None]
        sees = there[None, :] & exists[:, None]
        if CAUSAL:
            sees &= key[None, :] <= position[:, None]
        z = tl.where(sees, z, float("-inf"))
        tl.store(products[:, None] + slot[None, :], z, mask=inside[:, None])
        tl.store(greatest + block, tl.max(z, 1), mask=inside)


@triton.jit
def _slots(first, queries, keys, tiles, size, Index, CAUSAL: tl.constexpr):
    """Return how many keys a step looks at: those of listed tiles, or those up to the last query."""
    end = tiles * size
    if Index is None:
        end = tl.maximum(tl.minimum(first + queries, keys), 0) if CAUSAL else keys
    return end


@triton.jit(
    do_not_specialize=[*_NUMBERS, "v_batch", "v_head", "v_row"],
    do_not_specialize_on_alignment=["First", "Index", "Scratch", "Exponent", "Out"],
)
def _attend(
    First,
    Index,
    Scratch,
    queries,
    keys,
    heads,
    room,
    width,
    f_batch,
    i_batch,
    i_list,
    i_tile,
    tiles,
    size,
    V,
    Exponent,
    Out,
    v_batch,
    v_head,
    v_row,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, batch = (row // queries % heads).to(tl.int32), row // (queries * heads)
    first = origin_of(First, batch * f_batch, queries, keys).to(tl.int32)
    exponent = exponent_of(Exponent, head, KIND)
    products = Scratch + row * width  # of all keys; later of those that pass the bound
    passed, greatest = products + room, products + 2 * room
    chosen = greatest + room // N
    blocks = tl.cdiv(_slots(first, queries, keys, tiles, size, Index, CAUSAL), N)
    many, dim = tl.arange(0, W), tl.arange(0, PADDED)

    peaks = tl.full([W], float("-inf"), tl.float32)
    for begin in range(0, blocks, W):
        peaks = tl.maximum(peaks, tl.load(greatest + begin + many, mask=begin + many < blocks, other=float("-inf")))
    peak = tl.max(peaks, 0)
    out = tl.zeros([PADDED], tl.float32)
    if peak > float("-inf"):
        tau = peak - 1
        for _ in range(_FIRST_STEPS):
            tau += _rise(greatest, blocks, tau, exponent, KIND, W)
        bound = tau - _MARGIN * (1 + tl.abs(tau))

        listed = 0
        for begin in range(0, blocks, W):
            block = begin + many
            one = tl.load(greatest + block, mask=block < blocks, other=float("-inf")) > bound
            place = listed + tl.cumsum(one.to(tl.int32), 0) - one.to(tl.int32)
            tl.store(chosen + place, block.to(tl.float32, bitcast=True), mask=one)
            listed += tl.sum(one.to(tl.int32), 0)
        tl.debug_barrier()  # the blocks are written

        total = 0
        for begin in range(0, listed * N, W):
            slot = begin + many
            block = tl.load(chosen + slot // N, mask=slot < listed * N, other=0.0).to(tl.int32, bitcast=True)
            slot = tl.where(slot < listed * N, block * N + slot % N, -1)
            z = tl.load(products + slot, mask=slot >= 0, other=float("-inf"))
            one = (z > bound).to(tl.int32)
            place = total + tl.cumsum(one, 0) - one
            total += tl.sum(one, 0)
            tl.debug_barrier()  # all of these are read; no key is moved past the next ones
            tl.store(products + place, z, mask=one > 0)
            tl.store(passed + place, slot.to(tl.float32, bitcast=True), mask=one > 0)
        tl.debug_barrier()  # the products and keys are written

        tau, rises, steps = bound, (peak > float("-inf")).to(tl.int32), 0
        while (rises > 0) & (steps < STEPS):
            rise = _rise(products, total, tau, exponent, KIND, W)
            tau += rise
            rises = (rise > CLOSE * (1 + tl.abs(tau))).to(tl.int32)
            steps += 1

        few = tl.arange(0, C)
        V += (batch * v_batch + (head // GROUP).to(tl.int64) * v_head) * ALIGN
        mass = tl.zeros([C], tl.float32)
        for begin in range(0, total, C):
            there = begin + few < total
            z = tl.load(products + begin + few, mask=there, other=float("-inf"))
            weight, _slope = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
            mass += weight
            key = tl.load(passed + begin + few, mask=there, other=0.0).to(tl.int32, bitcast=True)
            if Index is not None:
                tile = tl.load(
                    Index + batch * i_batch + (head // SHARE) * i_list + key // size * i_tile, mask=there, other=0
                ).to(tl.int32)  # fmt: skip
                key = tile * size + key % size
            v = tl.load(
                V + (key.to(tl.int64) * v_row * ALIGN)[:, None] + dim[None, :],
                mask=(weight > 0)[:, None] & (dim < D)[None, :], other=0.0,
            )  # fmt: skip
            out += tl.sum(v.to(tl.float32) * weight[:, None], 0)
        out = out / tl.sum(mass, 0)
    tl.store(Out + row * D + dim, out.to(Out.dtype.element_ty), mask=dim < D)


@triton.jit
def _rise(Products, number, tau, exponent, KIND: tl.constexpr, W: tl.constexpr):
    """Return by how much a step of Newton's method over some products raises tau."""
    many = tl.arange(0, W)
    mass, slope = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    for begin in range(0, number, W):
        z = tl.load(Products + begin + many, mask=begin + many < number, other=float("-inf"))
        weight, gradient = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
        mass += weight
        slope += gradient
    return newton_step(tl.sum(mass, 0), tl.sum(slope, 0), exponent, KIND)
