"""Choose the tiles of the highest ranks for one query per head, and attend to their keys by entmax.

A program takes a list. No two ranks of a list are equal, so there is a number that just as many ranks as are wanted
reach; it is found by halving the range in which it lies. The listed keys are few, so their products are held at once.
"""

import triton
import triton.language as tl

from hf_sparse.ops.entmax.triton.common import CLOSE, STEPS, exponent_of, newton_step, powers

_NUMBERS = [
    "keys", "total", "width", "chosen", "products", "most", "factor", "heads", "q_batch", "q_head", "k_batch", "k_head",
    "k_row", "v_batch", "v_head", "v_row", "o_batch", "p_batch",
]  # fmt: skip
_ADDRESSES = ["Scratch", "Index", "Q", "Scale", "Exponent", "Order", "Position", "Out"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ADDRESSES)
def attend_best(
    Scratch,
    Index, Q, K, V, Scale, Exponent, Order, Position, Out, keys, total, width, chosen, products, most, factor, heads,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, p_batch,
    GROUP: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, W: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, KIND: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Write the tiles of a list to `Index`, -1 behind the last, or the outputs of its heads to `Out`.

    Program: list, text.
    """
    number, lists, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    pair = batch * lists + number
    ranks = Scratch + pair * width
    many = tl.arange(0, W)

    eligible = 0
    least, greatest = tl.full([W], (1 << 62), tl.int64), tl.full([W], -1, tl.int64)
    for begin in range(0, total, W):
        rank = tl.load(ranks + begin + many, mask=begin + many < total, other=-1)
        eligible += tl.sum((rank >= 0).to(tl.int32), 0)
        least = tl.minimum(least, tl.where(rank >= 0, rank, (1 << 62)))
        greatest = tl.maximum(greatest, rank)
    low, high = tl.min(least, 0), tl.max(greatest, 0)
    reached = eligible  # ranks of at least `low`
    while reached > most:
        middle = low + (high - low + 1) // 2
        count = 0
        for begin in range(0, total, W):
            rank = tl.load(ranks + begin + many, mask=begin + many < total, other=-1)
            count += tl.sum((rank >= middle).to(tl.int32), 0)
        low, high = tl.where(count >= most, middle, low), tl.where(count >= most, high, middle - 1)
        reached = tl.where(count >= most, count, reached)

    listed = 0
    for begin in range(0, total, W):
        rank = tl.load(ranks + begin + many, mask=begin + many < total, other=-1)
        one = (rank >= low).to(tl.int32)
        place = listed + tl.cumsum(one, 0) - one
        listed += tl.sum(one, 0)
        if Index is not None:
            tl.store(Index + pair * most + place, (begin + many).to(tl.int64), mask=one > 0)
        else:
            tl.store(Scratch + chosen + pair * most + place, (begin + many).to(tl.int64), mask=one > 0)
    if Index is not None:
        for begin in range(0, most, W):
            place = begin + many
            tl.store(Index + pair * most + place, tl.full([W], -1, tl.int64), mask=(place >= listed) & (place < most))
    else:
        tl.debug_barrier()  # the tiles are written
        position = keys - 1
        if Position is not None:
            position = tl.load(Position + batch * p_batch).to(tl.int32)
        kv = (number * SHARE // GROUP).to(tl.int64)
        K += (batch * k_batch + kv * k_head) * ALIGN
        V += (batch * v_batch + kv * v_head) * ALIGN
        few, all_slots, dim = tl.arange(0, C), tl.arange(0, S), tl.arange(0, PADDED)
        for member in range(SHARE):
            head = (number * SHARE + member).to(tl.int64)
            row = batch * heads + head
            cells = Scratch + products + row * S  # products, later weights
            scale = tl.load(Scale + head).to(tl.float32)
            scale = factor * (tl.exp(scale) if LOG else scale)
            exponent = exponent_of(Exponent, head, KIND)
            q = tl.load(Q + batch * q_batch + head * q_head + dim, mask=dim < D, other=0.0).to(tl.float32)
            for begin in range(0, listed * SIZE, C):
                slot = begin + few
                key = tl.load(Scratch + chosen + pair * most + slot // SIZE, mask=slot < listed * SIZE, other=0)
                key = key * SIZE + slot % SIZE
                there = (slot < listed * SIZE) & (key <= position)
                if Order is not None:
                    key = tl.load(Order + batch * o_batch + key, mask=there, other=0)
                k = tl.load(
                    K + (key * k_row * ALIGN)[:, None] + dim[None, :],
                    mask=there[:, None] & (dim < D)[None, :], other=0.0,
                )  # fmt: skip
                z = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
                z = tl.where(there, z, float("-inf"))
                tl.store(cells + slot, z.to(tl.int32, bitcast=True).to(tl.int64), mask=slot < S)
            tl.debug_barrier()  # the products are written
            z = tl.load(cells + all_slots, mask=all_slots < listed * SIZE, other=0)
            z = tl.where(all_slots < listed * SIZE, z.to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
            peak = tl.max(z, 0)
            out = tl.zeros([PADDED], tl.float32)
            if peak > float("-inf"):
                tau, rises, steps = peak - 1, (peak > float("-inf")).to(tl.int32), 0
                while (rises > 0) & (steps < STEPS):
                    weight, slope = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
                    rise = newton_step(tl.sum(weight, 0), tl.sum(slope, 0), exponent, KIND)
                    tau += rise
                    rises = (rise > CLOSE * (1 + tl.abs(tau))).to(tl.int32)
                    steps += 1
                weight, slope = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
                tl.debug_barrier()  # the products are read
                tl.store(cells + all_slots, weight.to(tl.int32, bitcast=True).to(tl.int64))
                tl.debug_barrier()  # the weights are written
                for begin in range(0, listed * SIZE, C):
                    slot = begin + few
                    share = tl.load(cells + slot, mask=slot < listed * SIZE, other=0)
                    share = share.to(tl.int32).to(tl.float32, bitcast=True)
                    key = tl.load(Scratch + chosen + pair * most + slot // SIZE, mask=share > 0, other=0)
                    key = key * SIZE + slot % SIZE
                    if Order is not None:
                        key = tl.load(Order + batch * o_batch + key, mask=share > 0, other=0)
                    v = tl.load(
                        V + (key * v_row * ALIGN)[:, None] + dim[None, :],
                        mask=(share > 0)[:, None] & (dim < D)[None, :], other=0.0,
                    )  # fmt: skip
                    out += tl.sum(v.to(tl.float32) * share[:, None], 0)
                out = out / tl.sum(weight, 0)
            tl.store(Out + row * D + dim, out.to(Out.dtype.element_ty), mask=dim < D)
