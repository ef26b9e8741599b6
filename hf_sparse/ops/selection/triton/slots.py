"""Take a decoding step over KV slots in kernels; `hf_sparse.ops.selection.slots` defines it.

One program per row and KV head finds the slot for the new token. Attention reads keys and values once for all query
heads of a KV head; where rows and heads are too few to fill the GPU, several programs share the slots of a head, and a
second kernel joins their results by their log masses.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_BYTES = 1 << 14  # bytes of keys per step of a program


def insert_token(
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    seen: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    valid: Tensor | None,
    *,
    window: int,
    sinks: int,
    counts: Sequence[int] | None = None,
    offsets: Tensor | None = None,
) -> None:
    """Insert as `ops.selection.slots.insert_token`; `keys`, `values`, `scores` and `positions` are contiguous.

    With `counts` and `offsets` they are buffers of heads with different numbers of slots, see `ops.selection.ragged`.
    """
    batch, heads, dim = keys.shape[0], key.shape[1], keys.shape[-1]
    slots = keys.shape[2] if counts is None else max(counts)
    key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (key, value))
    _insert[(batch, heads)](
        keys, values, scores, positions, seen, key, value, score, seen if valid is None else valid, offsets,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), score.stride(0), score.stride(1),
        0 if valid is None else valid.stride(0), slots, window, sinks, dim,
        DIM=triton.next_power_of_2(dim), SLOTS=triton.next_power_of_2(slots), MASKED=valid is not None, num_warps=4,
    )  # fmt: skip


def attend_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scaling: float,
    counts: Sequence[int] | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Attend as `ops.selection.slots.attend_slots`; `keys`, `values`, `positions` are contiguous, `D` at most 256.

    With `counts` and `offsets` they are buffers of heads with different numbers of slots, see `ops.selection.ragged`.
    """
    batch, dim = keys.shape[0], keys.shape[-1]
    counts = [keys.shape[2]] * keys.shape[1] if counts is None else counts
    heads = len(counts)
    query = query if query.stride(-1) == 1 else query.contiguous()
    group = query.shape[1] // heads
    width = triton.next_power_of_2(dim)
    step = max(16, min(64, _BYTES // (width * keys.element_size())))  # slots
    share = steps_of_program(counts, step, batch, _PROGRAMS)
    slots = max(counts)
    splits = triton.cdiv(triton.cdiv(slots, step), share)
    output = torch.empty((batch, heads * group, 1, dim), dtype=query.dtype, device=query.device)
    parts, masses = output, positions  # not used by the only program of a head
    if splits > 1:
        parts = torch.empty((batch * heads * group, splits, dim), dtype=torch.float32, device=query.device)
        masses = torch.empty((batch * heads * group, splits), dtype=torch.float32, device=query.device)
    _attend[(splits, batch, heads)](
        query, keys, values, positions, offsets, parts, masses, query.stride(0), query.stride(1), slots, group,
        share * step, scaling,
        GROUP=max(16, triton.next_power_of_2(group)), D=dim, DIM=max(16, width), BLOCK=step, SPLIT=splits > 1,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _join[(batch * heads * group,)](
            parts, masses, output, splits, dim, SPLITS=triton.next_power_of_2(splits), DIM=width, num_warps=2
        )
    return output


def steps_of_program(counts: Sequence[int], step: int, batch: int, programs: int) -> int:
    """Return how many steps of `step` slots a program takes, so that about so many share the slots of all heads.

    Heads with many slots have more programs, not longer ones.
    """
    wanted = triton.cdiv(programs, batch * len(counts))  # for a head, on average
    return triton.cdiv(sum(counts), step * len(counts) * min(triton.cdiv(max(counts), step), wanted))


@triton.jit
def slots_of_head(Offsets, row, head, heads, slots):
    """Return where the slots of a head begin, and how many it has: `slots`, or what `Offsets` `[heads + 1]` says."""
    base = (row * heads + head) * slots
    if Offsets is not None:
        begin = tl.load(Offsets + head)
        base = row * tl.load(Offsets + heads) + begin
        slots = tl.load(Offsets + head + 1) - begin
    return base, slots


@triton.jit
def _insert(
    keys, values, scores, positions, seen, key, value, score, valid, Offsets, key_row, key_head, value_row, value_head,
    score_row, score_head, valid_row, slots, window, sinks, dim,
    DIM: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    base, slots = slots_of_head(Offsets, row, head, tl.num_programs(1), slots)
    index = tl.arange(0, SLOTS)
    inside = index < slots
    position = tl.load(seen + row)
    held = tl.load(positions + base + index, mask=inside, other=0)
    eligible = inside & (held >= sinks) & (held <= position - window)
    old = tl.load(scores + base + index, mask=inside, other=0.0)
    old = tl.where(eligible, old, float("inf"))
    weakest = eligible & (old == tl.min(old, 0))
    later = tl.where(weakest, held, -1)
    victim = tl.min(tl.where(inside & (later == tl.max(later, 0)), index, SLOTS), 0)
    empty = tl.min(tl.where(inside & (held < 0), index, SLOTS), 0)
    slot = tl.where(empty < SLOTS, empty, victim)
    real = position >= 0
    if MASKED:
        real = tl.load(valid + row * valid_row) != 0
    column = tl.arange(0, DIM)
    write = (column < dim) & real
    at = (base + slot) * dim + column
    tl.store(keys + at, tl.load(key + row * key_row + head * key_head + column, mask=write), mask=write)
    tl.store(values + at, tl.load(value + row * value_row + head * value_head + column, mask=write), mask=write)
    new = tl.load(score + row * score_row + head * score_head).to(tl.float32)
    tl.store(scores + base + slot, new, mask=real)
    tl.store(positions + base + slot, position, mask=real)


@triton.jit
def _attend(
    query, keys, values, positions, Offsets, parts, masses, query_row, query_head, slots, group, share, scaling,
    GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads `[group]` of one KV head to `share` of its slots."""
    scaling = tl.cast(scaling, tl.float32)  # float64 when torch.compile calls the kernel
    split, row, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = row * tl.num_programs(2) + head
    base, slots = slots_of_head(Offsets, row, head, tl.num_programs(2), slots)
    member, column = tl.arange(0, GROUP), tl.arange(0, DIM)
    rows = member[:, None] < group
    wide = column[None, :] < D
    at = row * query_row + (head * group + member[:, None]) * query_head + column[None, :]
    q = tl.load(query + at, mask=rows & wide, other=0.0)
    peak = tl.full([GROUP], -float("inf"), tl.float32)
    mass = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, DIM], tl.float32)
    for begin in range(0, share, BLOCK):
        slot = split * share + begin + tl.arange(0, BLOCK)
        filled = tl.load(positions + base + slot, mask=slot < slots, other=-1) >= 0
        where = (base + slot[:, None]) * D + column[None, :]
        k = tl.load(keys + where, mask=filled[:, None] & wide, other=0.0)
        v = tl.load(values + where, mask=filled[:, None] & wide, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        logits = tl.where(filled[None, :], logits, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp(logits - anchor[:, None])
        rescale = tl.exp(peak - anchor)
        mass = mass * rescale + tl.sum(weight, 1)
        out = out * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher
    out = out / tl.where(mass == 0, 1.0, mass)[:, None]
    number = pair * group + member
    if SPLIT:
        number = number * tl.num_programs(0) + split
        tl.store(masses + number, peak + tl.log(mass), mask=member < group)
    tl.store(parts + number[:, None] * D + column[None, :], out.to(parts.dtype.element_ty), mask=rows & wide)


@triton.jit
def _join(parts, masses, output, splits, dim, SPLITS: tl.constexpr, DIM: tl.constexpr):
    """Average the results of all programs of a query head, weighted by their masses."""
    number = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, DIM)
    log_mass = tl.load(masses + number * splits + split, mask=split < splits, other=-float("inf"))
    peak = tl.max(log_mass, 0)
    weight = tl.exp(log_mass - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    mask = (split[:, None] < splits) & (column[None, :] < dim)
    part = tl.load(parts + (number * splits + split[:, None]) * dim + column[None, :], mask=mask, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(output + number * dim + column, out.to(output.dtype.element_ty), mask=column < dim)
