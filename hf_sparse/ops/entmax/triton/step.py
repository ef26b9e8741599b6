"""Take a decoding step of exact entmax attention in two kernels: every key is read once, and few values are.

`_products` splits the keys over programs. A program multiplies its share with all query heads of a KV head, or of a
list of tiles, and keeps the products in float32, with the greatest of every few keys. `_attend` has a program for
each row. tau over these greatest products is never above tau over all, so only keys beside one that passes it are
looked at again, and those that pass it are written out side by side. Over these tau is found, and the values of the
keys with weight are added up.

Lengths are numbers that no kernel is compiled for, and positions may lie on the device alone, so a step can be captured
in a CUDA graph and replayed while a text grows in a cache of fixed size. In a cache that grows, the first kernel writes
the key and the value of the newest token where the cache keeps them, which saves the launches for that.
"""

from collections.abc import Hashable

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
from hf_sparse.ops.triton.repeated import RepeatedLaunch
from hf_sparse.ops.triton.sizes import padded

BLOCK = 64  # keys that a program of `_products` takes at a time
GREATEST = 8  # keys of which the greatest product is kept
PROGRAMS = 512  # of `_products`: about four for each multiprocessor of a large GPU
WIDE = 1024  # products that a program of `_attend` holds at a time
GATHERED = 128  # values that it holds at a time, of heads of up to 128
STAGES = 3  # of Triton, in the loop over the keys
ROUNDED = 1024  # a row of the buffer has a multiple of so many products: a growing text asks for few sizes
ALIGNED = 16  # bytes of addresses, elements of strides

_FIRST_STEPS = tl.constexpr(4)  # of Newton's method over the greatest products
_MARGIN = tl.constexpr(4e-6)  # more than the rounding of a lower bound


class StepPlan:
    """Launch the steps that differ in length, strides and addresses alone.

    Args:
        query, key, value: of the first step; see `step`.
        lists: lists of keys per text, one for each KV head unless tiles are listed.
        kind, is_log, causal: see `step`.
        sizes: `block`, `greatest`, `programs`, `wide`, `gathered`, `stages` and `warps` as in `step`.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lists: int,
        *,
        kind: int,
        is_log: bool,
        causal: bool,
        block: int = BLOCK,
        greatest: int = GREATEST,
        programs: int = PROGRAMS,
        wide: int = WIDE,
        gathered: int = GATHERED,
        stages: int | None = None,
        warps: int = 4,
    ) -> None:
        heads, queries, dim = query.shape[1:]
        share, self.align = heads // lists, _alignment(key, value)
        members = max(16, triton.next_power_of_2(share * queries))
        shared = (heads // key.shape[1], share, dim, padded(dim), causal, self.align, block, greatest)
        if stages is None:  # keys of three stages are not to need more shared memory than a GPU has
            stages = STAGES if padded(dim) * query.element_size() <= 512 else 1
        self.block, self.greatest, self.programs = block, greatest, programs
        of_keys = (*shared, is_log, members, precision_of(query.dtype), stages)
        self._products = RepeatedLaunch(_products, of_keys)
        self._attend = RepeatedLaunch(
            _attend, (*shared, kind, wide, gathered if dim <= 128 else gathered // 2), warps=warps
        )

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: Tensor,
        exponent: Tensor | None,
        factor: float,
        valid: Tensor | None,
        first: Tensor | None,
        index: Tensor | None,
        size: int,
        newest: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return the output `[B, Hq, Tq, D]`, contiguous; the arguments are those of `step`."""
        batch, heads, queries, dim = query.shape
        lists, keys = key.shape[1:3]
        tiles, slots, i_batch, i_list, i_tile = 0, keys, 0, 0, 0
        if index is not None:
            lists, tiles, slots = max(lists, index.shape[1]), index.shape[3], index.shape[3] * size
            i_batch, i_list = (index.stride(place) if index.shape[place] > 1 else 0 for place in (0, 1))
            i_tile = index.stride(3)
        k_batch, k_head, k_row, _ = key.stride()
        v_batch, v_head, v_row, _ = value.stride()
        new_key, new_value, n_batch, n_head, w_batch, w_head = None, None, 0, 0, 0, 0
        if newest is not None:
            new_key, new_value = newest
            n_batch, n_head, _, _ = new_key.stride()
            w_batch, w_head, _, _ = new_value.stride()
        align = self.align
        if align > 1:
            k_batch, k_head, k_row = k_batch // align, k_head // align, k_row // align
            v_batch, v_head, v_row = v_batch // align, v_head // align, v_row // align
        rows = batch * heads * queries
        room = max(1, -(-slots // ROUNDED)) * ROUNDED
        width = 2 * (room + room // self.greatest)
        scratch = torch.empty(rows * width, dtype=torch.float32, device=query.device)
        output = torch.empty((batch, heads, queries, dim), dtype=query.dtype, device=query.device)
        splits = max(1, min(-(-slots // self.block), -(-self.programs // (batch * lists))))
        f_batch = 0 if first is None or first.numel() == 1 else first.stride(0)
        q_batch, q_head, q_row, _ = query.stride()
        m_batch = 0 if valid is None else valid.stride(0)
        listed = [
            first, index, scratch, queries, keys, heads, room, width, f_batch, i_batch, i_list, i_tile, tiles, size,
        ]  # fmt: skip
        of_keys = [
            *listed, query, key, value, new_key, new_value, scale, valid, factor, q_batch, q_head, q_row, k_batch,
            k_head, k_row, v_batch, v_head, v_row, n_batch, n_head, w_batch, w_head, m_batch,
        ]  # fmt: skip
        self._products((splits, lists, batch), of_keys)
        self._attend((rows, 1, 1), [*listed, value, exponent, output, v_batch, v_head, v_row])
        return output


_plans: dict[Hashable, StepPlan] = {}


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
    newest: tuple[Tensor, Tensor] | None = None,
    **sizes: int,
) -> Tensor:
    """Return the output `[B, Hq, Tq, D]`, contiguous.

    Args:
        query, key, value, scale, exponent, kind, factor, is_log, causal, valid, first, index, size: as in
            `hf_sparse.ops.entmax.step._plain`.
        newest: key and value `[B, Hkv, 1, D]` of the token of the query, to be written there by the way; whatever is
            there is not read. For one causal query per text, without lists.
        sizes: `block`, `programs`, `stages`: keys at a time, programs and Triton's stages of the kernel that
            multiplies. `greatest`: keys of which the greatest product is kept, a divisor of `block`. `wide`,
            `gathered`, `warps`: products and values at a time, and Triton's warps, of the kernel of the rows.
    """
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    lists = key.shape[1] if index is None else max(key.shape[1], index.shape[1])
    name = (
        query.device, query.dtype, query.shape[1:], key.shape[1], lists, index is None, scale.dtype,
        None if exponent is None else exponent.dtype, None if valid is None else valid.dtype,
        None if first is None else first.dtype, newest is None, key.data_ptr() % ALIGNED == 0,
        value.data_ptr() % ALIGNED == 0, _alignment(key, value), kind, is_log, causal, *sizes.items(),
    )  # fmt: skip
    plan = _plans.get(name)
    if plan is None:
        plan = _plans[name] = StepPlan(query, key, value, lists, kind=kind, is_log=is_log, causal=causal, **sizes)
    return plan.run(query, key, value, scale, exponent, factor, valid, first, index, size, newest)


def _alignment(key: Tensor, value: Tensor) -> int:
    """Return `ALIGNED` if all addresses of rows are multiples of it, and 1 otherwise."""
    k_batch, k_head, k_row, _ = key.stride()
    v_batch, v_head, v_row, _ = value.stride()
    together = k_batch | k_head | k_row | v_batch | v_head | v_row | key.data_ptr() | value.data_ptr()
    return 1 if together % ALIGNED else ALIGNED


_NUMBERS = ["queries", "keys", "heads", "room", "width", "f_batch", "i_batch", "i_list", "i_tile", "tiles", "size"]
_STRIDES = ["factor", "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"]
_OF_NEWEST = ["n_batch", "n_head", "w_batch", "w_head", "m_batch"]
_ADDRESSES = ["First", "Index", "Scratch", "Q", "NewK", "NewV", "Scale", "Valid"]


@triton.jit(do_not_specialize=[*_NUMBERS, *_STRIDES, *_OF_NEWEST], do_not_specialize_on_alignment=_ADDRESSES)
def _products(
    First,
    Index, Scratch, queries, keys, heads, room, width, f_batch, i_batch, i_list, i_tile, tiles, size, Q, K, V, NewK,
    NewV, Scale, Valid, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, n_batch, n_head, w_batch, w_head, m_batch,
    GROUP: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGN: tl.constexpr, N: tl.constexpr, P: tl.constexpr, LOG: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
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
    kv = (number * SHARE // GROUP).to(tl.int64)
    K += (batch * k_batch + kv * k_head) * ALIGN
    row = (batch * heads + head) * queries + index
    products = Scratch + row * width
    greatest = products + 2 * room
    end = _slots(first, queries, keys, tiles, size, Index, CAUSAL)
    blocks = tl.cdiv(end, N)
    share = tl.cdiv(blocks, tl.num_programs(0))
    begin = tl.program_id(0) * share
    if NewK is not None:  # the key of the query: nothing reads where it is written before this kernel ends
        new_key = tl.load(NewK + batch * n_batch + kv * n_head + dim, mask=dim < D, other=0.0)
        if begin + share >= blocks and begin < blocks:
            new_value = tl.load(NewV + batch * w_batch + kv * w_head + dim, mask=dim < D, other=0.0)
            last = first.to(tl.int64)
            tl.store(K + last * k_row * ALIGN + dim, new_key, mask=dim < D)
            tl.store(V + (batch * v_batch + kv * v_head + last * v_row) * ALIGN + dim, new_value, mask=dim < D)
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
        kept = there
        if NewK is not None:
            kept &= key < first
        k = tl.load(
            K + (key.to(tl.int64) * k_row * ALIGN)[:, None] + dim[None, :],
            mask=kept[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        if NewK is not None:
            k = tl.where((key == first)[:, None], new_key[None, :], k)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None]
        sees = there[None, :] & exists[:, None]
        if CAUSAL:
            sees &= key[None, :] <= position[:, None]
        z = tl.where(sees, z, float("-inf"))
        tl.store(products[:, None] + slot[None, :], z, mask=inside[:, None])
        peaks = tl.max(tl.reshape(z, [M, N // P, P]), 2)
        part = block * (N // P) + tl.arange(0, N // P)
        tl.store(greatest[:, None] + part[None, :], peaks, mask=inside[:, None])


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
    P: tl.constexpr,
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
    chosen = greatest + room // P
    parts = tl.cdiv(_slots(first, queries, keys, tiles, size, Index, CAUSAL), N) * (N // P)
    many, dim = tl.arange(0, W), tl.arange(0, PADDED)

    peaks = tl.full([W], float("-inf"), tl.float32)
    for begin in range(0, parts, W):
        peaks = tl.maximum(peaks, tl.load(greatest + begin + many, mask=begin + many < parts, other=float("-inf")))
    peak = tl.max(peaks, 0)
    out = tl.zeros([PADDED], tl.float32)
    if peak > float("-inf"):
        tau = peak - 1
        for _ in range(_FIRST_STEPS):
            tau += _rise(greatest, parts, tau, exponent, KIND, W)
        bound = tau - _MARGIN * (1 + tl.abs(tau))

        listed = 0
        for begin in range(0, parts, W):
            part = begin + many
            one = (tl.load(greatest + part, mask=part < parts, other=float("-inf")) > bound).to(tl.int32)
            place = listed + tl.cumsum(one, 0) - one
            tl.store(chosen + place, part.to(tl.float32, bitcast=True), mask=one > 0)
            listed += tl.sum(one, 0)
        tl.debug_barrier()  # the parts are written

        total = 0
        for begin in range(0, listed * P, W):
            slot = begin + many
            part = tl.load(chosen + slot // P, mask=slot < listed * P, other=0.0).to(tl.int32, bitcast=True)
            slot = tl.where(slot < listed * P, part * P + slot % P, -1)
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

        kept = 0
        mass = tl.zeros([W], tl.float32)
        for begin in range(0, total, W):
            there = begin + many < total
            z = tl.load(products + begin + many, mask=there, other=float("-inf"))
            slot = tl.load(passed + begin + many, mask=there, other=0.0)
            weight, _slope = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
            mass += weight
            one = (weight > 0).to(tl.int32)
            place = kept + tl.cumsum(one, 0) - one
            kept += tl.sum(one, 0)
            tl.debug_barrier()  # all of these are read
            tl.store(products + place, weight, mask=one > 0)
            tl.store(passed + place, slot, mask=one > 0)
        tl.debug_barrier()  # the weights and keys are written

        few = tl.arange(0, C)
        V += (batch * v_batch + (head // GROUP).to(tl.int64) * v_head) * ALIGN
        for begin in range(0, kept, C):
            there = begin + few < kept
            weight = tl.load(products + begin + few, mask=there, other=0.0)
            key = tl.load(passed + begin + few, mask=there, other=0.0).to(tl.int32, bitcast=True)
            if Index is not None:
                tile = tl.load(
                    Index + batch * i_batch + (head // SHARE) * i_list + key // size * i_tile, mask=there, other=0
                ).to(tl.int32)  # fmt: skip
                key = tile * size + key % size
            v = tl.load(
                V + (key.to(tl.int64) * v_row * ALIGN)[:, None] + dim[None, :],
                mask=there[:, None] & (dim < D)[None, :], other=0.0,
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
