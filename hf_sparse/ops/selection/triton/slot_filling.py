"""Fill the KV slots of a text that has just been read, in two kernels; `hf_sparse.ops.selection.slots` defines them.

One program per row and KV head finds the keys to keep. The k-th best score outside sinks and window is found byte by
byte, by counting the keys that share the bytes found so far; of equal scores the lower positions stay. Then all
programs copy keys and values.
"""

import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.selection.triton.slots import slots_of_head
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, replayed

_KEYS = 2048  # that a program looks at together
_ROWS = 32  # slots that a program copies


def fill_slots(
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    seen: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    *,
    window: int,
    sinks: int,
    most: int | None = None,
    offsets: Tensor | None = None,
) -> None:
    """Fill as `ops.selection.slots.fill_slots`; keys, values, their tables and `seen` are contiguous.

    With `offsets` they are buffers of heads with different numbers of slots, `most` of them or fewer, see
    `ops.selection.ragged`.
    """
    key, value, score = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value, score))
    most = keys.shape[2] if most is None else most
    replayed(_fill, (keys, values, scores, positions, seen, key, value, score, offsets), window, sinks, most)


def _fill(
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    seen: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    offsets: Tensor | None,
    window: int,
    sinks: int,
    most: int,
) -> tuple[Tensor | None, ...]:
    kept = empty(positions.shape, positions.dtype, keys.device)
    launch(_choose, key.shape[:2])(
        score, kept, scores, positions, seen, offsets, *score.stride()[:2], key.shape[2], most, window, sinks,
        KEYS=_KEYS, num_warps=8,
    )  # fmt: skip
    batch, heads, length, dim = key.shape
    launch(_copy, (triton.cdiv(min(length, most), _ROWS), batch, heads))(
        kept, key, value, keys, values, offsets, *key.stride()[:3], *value.stride()[:3], length, most, dim,
        ROWS=_ROWS, DIM=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return ()


@triton.jit
def _ordered(score):
    """Return float32 scores as integers from 0 to 2^32 - 1 of the same order; -0 equals 0."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit(do_not_specialize=["length", "slots", "window", "sinks"])
def _choose(
    Score, Kept, scores, positions, seen, Offsets, score_batch, score_head, length, slots, window, sinks,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Write the positions to keep, in rising order, and the scores there; -1 for slots that stay empty."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    Score += row * score_batch + head * score_head
    base, slots = slots_of_head(Offsets, row, head, tl.num_programs(1), slots)
    index = tl.arange(0, KEYS)
    end = length - window  # of the keys that compete
    wanted = slots - window - sinks
    bound = tl.full([], 0, tl.int64)  # the bytes of the k-th best score that are known
    if length > slots:
        number = tl.arange(0, 512)
        for step in tl.static_range(4):
            shift = 24 - 8 * step
            counts = tl.zeros([512], tl.int32)
            for begin in range(0, end, KEYS):
                key = begin + index
                competes = (key >= sinks) & (key < end)
                code = _ordered(tl.load(Score + key, mask=competes, other=0.0))
                alike = competes & ((code >> (shift + 8)) == (bound >> (shift + 8)))
                counts += tl.histogram(tl.where(alike, (code >> shift) & 255, 256).to(tl.int32), 512)
            counts = tl.where(number < 256, counts, 0)
            at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
            byte = tl.max(tl.where((at_least >= wanted) & (number < 256), number, 0), 0)
            wanted -= tl.sum(tl.where(number > byte, counts, 0), 0)
            bound += byte.to(tl.int64) << shift
    # Of the keys at the bound the first `wanted` stay.
    place, equal = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for begin in range(0, length, KEYS):
        key = begin + index
        there = key < length
        score = tl.load(Score + key, mask=there, other=0.0).to(tl.float32)
        code = _ordered(score)
        competes = (key >= sinks) & (key < end) & (length > slots)
        at_bound = competes & (code == bound)
        before = equal + tl.cumsum(at_bound.to(tl.int32), 0)
        stays = there & ((competes == 0) | (code > bound) | (at_bound & (before <= wanted)))
        to = base + place + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(Kept + to, key.to(tl.int64), mask=stays)
        tl.store(positions + to, key.to(tl.int64), mask=stays)
        tl.store(scores + to, score, mask=stays)
        place += tl.sum(stays.to(tl.int32), 0)
        equal += tl.sum(at_bound.to(tl.int32), 0)
    for begin in range(length // KEYS * KEYS, slots, KEYS):
        slot = begin + index
        tl.store(positions + base + slot, -1, mask=(slot >= length) & (slot < slots))
    if head == 0:
        tl.store(seen + row, length.to(tl.int64))


@triton.jit(do_not_specialize=["filled", "slots"])
def _copy(
    Kept, Key, Value, keys, values, Offsets, key_batch, key_head, key_row, value_batch, value_head, value_row, filled,
    slots, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Copy the kept keys and values of ROWS slots."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    base, slots = slots_of_head(Offsets, row, head, tl.num_programs(2), slots)
    filled = tl.minimum(filled, slots)
    slot, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    kept = tl.load(Kept + base + slot, mask=slot < filled, other=0)[:, None]
    mask = (slot < filled)[:, None] & (column < dim)[None, :]
    to = (base + slot)[:, None] * dim + column[None, :]
    of_key = row * key_batch + head * key_head + kept * key_row + column[None, :]
    held = mask & (kept >= 0)
    tl.store(keys + to, tl.load(Key + of_key, mask=held, other=0.0), mask=mask)
    of_value = row * value_batch + head * value_head + kept * value_row + column[None, :]
    tl.store(values + to, tl.load(Value + of_value, mask=held, other=0.0), mask=mask)
