"""Run a whole decoding step over KV slots in one kernel, as `ops.selection.slots` and `linear_scores` compute it.

A step that runs eager waits for the CPU that launches it, so it is one launch, with a plan that is made once. Every
program finds the slot that the new token takes and attends to its share of the slots, with the new key and value in
place of what that slot holds: nothing is written yet, since the other programs of a head still read. Beside them one
program for each head scores the token. The last program of a head to arrive joins their results and writes the slot;
the last head to arrive counts the token. The counters of arrivals return to zero by themselves.

A step waits for memory again and again rather than for the amount that it reads, so that what can be read early is:
keys and values while earlier ones are attended to, and the results of all programs of a head at once.

The slots may be rows of a pool, which an index chooses: so requests that come and go share a kernel and its memory, and
a recorded graph reads the index when it is replayed.

Sums of a score are in float64, as in `hf_sparse.ops.selection.triton.linear_scores`, so that equal inputs have equal
float32 scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.selection.linear_scores import Slopes
from hf_sparse.ops.selection.triton.linear_scores import slope_positions
from hf_sparse.ops.selection.triton.slots import slots_of_head, steps_of_program
from hf_sparse.ops.triton.launch import begin_compiling, wait_for

_PROGRAMS = 512  # about four for each multiprocessor of a large GPU
_BYTES = 1 << 13  # bytes of keys per step of a program
_SHARED = 48 << 10  # bytes of keys and values on their way to a program, which any GPU has room for
_CHUNK = 1024  # slots that are searched at a time, twice as many of unequal heads
_COLUMNS = 1024  # columns of the input that are summed at a time
_ROWS = 128  # rows that are counted at a time
_EPS = 1e-5  # epsilon of the layer norm of the scores


class StepKernel:
    """Launch the kernel for slots at fixed addresses and new tokens of a fixed layout.

    Args:
        slots: keys and values `[B, Hkv, S, D]`, scores float32 and positions int64 `[B, Hkv, S]`, seen int64 `[B]`,
            padded_late bool `[B]` and the count of all tokens, int64 without dimensions; contiguous. Of a pool only
            the first five, with any number of rows, each dense from the second dimension on; it is not kept, so that
            whoever has the pool can give its memory back.
        query, key, value: tensors of a new token as in `__call__`; the next ones have their shapes, dtypes and strides.
        weight: `[Hkv, C]` of a linear scorer, contiguous, or `None`.
        slope: `[Hkv]`, what each head adds per `slopes.tokens` tokens of position, contiguous, or `None`.
        slopes: of the scores, see `ops.selection.linear_scores.Slopes`.
        masked: whether the steps come with `valid`.
        indexed: whether they come with `rows`, the rows of a pool.
        window, sinks: see `hf_sparse.ops.selection.slots`.
        scaling: multiplies the logits.
        counts, offsets: where heads have different numbers of slots, in buffers `[B, R, ...]`; see
            `hf_sparse.ops.selection.ragged`.
        arrived: int32 `[B * Hkv + 1]` of zeros for the counters, or `None` to make them.
        scratch: what `scratch_of_rows` returned; `None`, or one that is too small, for memory that no other kernel has.
    """

    def __init__(
        self,
        slots: Sequence[Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None,
        slope: Tensor | None,
        *,
        slopes: Slopes,
        masked: bool,
        window: int,
        sinks: int,
        scaling: float,
        indexed: bool = False,
        counts: Sequence[int] | None = None,
        offsets: Tensor | None = None,
        arrived: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> None:
        batch, heads, dim = query.shape[0], key.shape[1], slots[0].shape[-1]
        counts = [slots[0].shape[2]] * heads if counts is None else counts
        number, device, group = max(counts), query.device, query.shape[1] // heads
        width = triton.next_power_of_2(dim)
        block = max(16, min(64, _BYTES // (width * query.element_size())))  # slots
        share = steps_of_program(counts, block, batch, _PROGRAMS)
        splits = triton.cdiv(triton.cdiv(number, block), share)
        self.shape = (batch, heads * group, 1, dim)
        self.dtype, self.device, self.masked, self.indexed = query.dtype, device, masked, indexed
        parts = (batch * heads * group, 0 if splits == 1 and offsets is None else splits)
        count = parts[0] * parts[1] * dim
        if scratch is None or scratch.numel() < count:
            scratch = torch.empty(count, dtype=torch.float32, device=device)
        self.scratch = (
            scratch[:count].view(*parts, dim),
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.zeros(batch * heads + 1, dtype=torch.int32, device=device) if arrived is None else arrived,
            torch.empty(batch * heads, dtype=torch.float32, device=device),
        )
        self.slots = () if indexed else tuple(slots)  # keeps the memory
        self.grid = (splits if weight is None else splits + 1, heads, batch)
        self.offsets = offsets
        self.layout = (
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            *(tensor.stride(0) for tensor in slots[:5]),
            number if offsets is None else 0, window, sinks, 0 if weight is None else weight.shape[1], group,
            share * block, splits, scaling,
        )  # fmt: skip
        self.constants = {
            "SLOPE": slopes.position_slope,
            "SLOPE_TOKENS": slopes.tokens,
            "SLOPE_LENGTH": slopes.length,
            "LEARNED": slope is not None,
            "LINEAR": weight is not None,
            "MASKED": masked,
            "INDEXED": indexed,
            "EPS": _EPS,
            # Layers of unequal heads share a kernel unless their longest heads differ twofold.
            "SPLITS": splits if offsets is None else 0,
            # Where heads differ, that of a row says nothing of where the slots of a head begin.
            "ALIGNED": offsets is None and not any(tensor.stride(0) % 16 for tensor in slots[2:4]),
            "SPLITS_WIDE": triton.next_power_of_2(splits),
            "GROUP": max(16, triton.next_power_of_2(group)),
            "MEMBERS": triton.next_power_of_2(group),
            "D": dim,
            "DIM": max(16, width),
            "BLOCK": block,
            "STAGES": max(1, min(3, _SHARED // (2 * block * width * query.element_size()))),
            # The longest of unequal heads, for which all wait, would take a round more than equal ones.
            "CHUNK": min(_CHUNK if offsets is None else 2 * _CHUNK, triton.next_power_of_2(number)),
            "COLUMNS": _COLUMNS,
            "ROWS": _ROWS,
        }
        self.rest = (*self.layout, *self.constants.values())
        self.addresses: tuple[int | None, ...] = ()
        self.launch: Any = None  # made by the first step, which compiles

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        states: Tensor,
        weight: Tensor | None,
        slope: Tensor | None,
        valid: Tensor | None,
        rows: Tensor | None = None,
        pool: Sequence[Tensor] = (),
    ) -> Tensor:
        """Take the step: `[B, Hq, 1, D]`, `[B, Hkv, 1, D]` twice -> attention `[B, Hq, 1, D]`, contiguous.

        Args:
            states: the input of the attention module `[B, 1, C]`, or scores `[B, Hkv, 1]` if there is no weight;
                contiguous along the last two dimensions.
            valid: `[B]` or `[B, 1]` bool, rows whose token is real; `None` if all are.
            rows: `[B]` of integers, the rows of a pool, no row twice; one below 0 stands for none.
            pool: the slots of the pool, at the addresses of those that the kernel was made for.
        """
        output = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        tensors = (query, key, value, states, weight, slope, valid, rows, output)
        strides = (
            states.stride(0), 0 if valid is None else valid.stride(0), 0 if rows is None else rows.stride(0),
        )  # fmt: skip
        if self.launch is not None:
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            self.launch(*self.addresses, *addresses, *strides, *self.rest)
            return output
        slots = (*pool, pool[4], pool[4]) if self.indexed else self.slots  # there is no padding in a pool
        fixed = (*slots, *self.scratch, self.offsets)
        given = [slots[0] if tensor is None else tensor for tensor in tensors]  # not read
        arguments, constants = (
            (*fixed, *given, *strides, *self.layout),
            self.constants | {"num_warps": 4, "num_stages": 3},
        )
        if query.is_meta:
            _step.warmup(*arguments, grid=self.grid, **constants)
            return output
        wait_for(_step)
        compiled = _step[self.grid](*arguments, **constants)
        if compiled is not None:  # not so in Triton's interpreter
            # The binary was chosen by values that no later step changes, so the choice need not be made again.
            self.addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in fixed)
            self.launch = compiled[self.grid]
        return output


def scratch_of_rows(query_heads: int, kv_heads: int, dim: int, device: torch.device) -> Tensor:
    """Make memory that the kernels of one layer share, for any numbers of requests, since no two run at a time.

    Where several programs share a head, and heads have as many slots each, they are fewer than twice `_PROGRAMS`.
    """
    return torch.empty(2 * _PROGRAMS * (query_heads // kv_heads) * dim, dtype=torch.float32, device=device)


def begin_steps(steps: Callable[[], object], device: torch.device) -> None:
    """Compile in the background the kernels of the steps that `steps()` takes with meta tensors."""
    begin_compiling(_step, steps, device)


_ADDRESSES = ["query", "key", "value", "states", "weight", "slope", "valid", "rows"]  # of unknown alignment


@triton.jit(
    do_not_specialize=["states_row", "valid_row", "rows_step", "most_splits", "window", "sinks"],
    do_not_specialize_on_alignment=[*_ADDRESSES, "scores_row", "positions_row"],
)
def _step(
    keys,
    values,
    scores,
    positions,
    seen,
    padded_late,
    total,
    parts,
    masses,
    arrived,
    fresh_scores,
    Offsets,
    query,
    key,
    value,
    states,
    weight,
    slope,
    valid,
    rows,
    output,
    states_row,
    valid_row,
    rows_step,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    keys_row,
    values_row,
    scores_row,
    positions_row,
    seen_row,
    slots,
    window,
    sinks,
    columns,
    group,
    share,
    most_splits,
    scaling,
    SLOPE: tl.constexpr,
    SLOPE_TOKENS: tl.constexpr,
    SLOPE_LENGTH: tl.constexpr,
    LEARNED: tl.constexpr,
    LINEAR: tl.constexpr,
    MASKED: tl.constexpr,
    INDEXED: tl.constexpr,
    EPS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLITS_WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads, batch = tl.num_programs(1), tl.num_programs(2)
    pair = row * heads + head
    place = row  # where the slots lie
    real = row >= 0
    if INDEXED:
        place = tl.load(rows + row * rows_step).to(tl.int64)
        real = place >= 0
        place = tl.maximum(place, 0)
    base, slots = slots_of_head(Offsets, 0, head, heads, slots)
    splits, most = SPLITS, SPLITS  # programs of this head, and of the longest one
    if Offsets is not None:
        splits, most = tl.cdiv(slots, share), most_splits
    if (split >= splits) & (split < most):
        return
    position = tl.load(seen + place * seen_row)
    keys += place * keys_row + base * D
    values += place * values_row + base * D
    of_scores, of_positions = place * scores_row, place * positions_row
    if ALIGNED:
        of_scores, of_positions = tl.multiple_of(of_scores, 16), tl.multiple_of(of_positions, 16)
    scores += of_scores + base
    positions += of_positions + base
    if MASKED:
        real = tl.load(valid + row * valid_row) != 0
    column = tl.arange(0, DIM)
    first = pair * group  # query head
    target = tl.full([], 0, tl.int32)
    if split < most:
        member, wide = tl.arange(0, GROUP), column[None, :] < D
        of_group = member[:, None] < group
        at = row * query_row + (head * group + member[:, None]) * query_head + column[None, :]
        q = tl.load(query + at, mask=of_group & wide, other=0.0)
        new_key = tl.load(key + row * key_row + head * key_head + column, mask=column < D, other=0.0)
        new_value = tl.load(value + row * value_row + head * value_head + column, mask=column < D, other=0.0)
        peak = tl.full([GROUP], -float("inf"), tl.float32)
        mass = tl.zeros([GROUP], tl.float32)
        out = tl.zeros([GROUP, DIM], tl.float32)
        new_logits = tl.sum(q.to(tl.float32) * new_key[None, :].to(tl.float32), 1)
        target = _slot_of_next(scores, positions, position, slots, window, sinks, CHUNK)
        # Keys and values go to the products as they are loaded, so that those of two steps ahead are on their way.
        for begin in tl.range(0, share, BLOCK, num_stages=STAGES):
            slot = split * share + begin + tl.arange(0, BLOCK)
            held, k, v = _load_slots(keys, values, positions, slot, slots, column, D)
            fresh = (slot == target) & real
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            logits = tl.where(fresh[None, :], new_logits[:, None], logits) * scaling
            logits = tl.where((held | fresh)[None, :], logits, -float("inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))
            anchor = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp(logits - anchor[:, None])
            rescale = tl.exp(peak - anchor)
            mass = mass * rescale + tl.sum(weights, 1)
            of_new = tl.sum(tl.where(fresh[None, :], weights, 0.0), 1)
            weights = tl.where(fresh[None, :], 0.0, weights).to(v.dtype)
            out = out * rescale[:, None] + of_new[:, None] * new_value[None, :].to(tl.float32)
            out += tl.dot(weights, v, input_precision="ieee")
            peak = higher
        out = out / tl.where(mass == 0, 1.0, mass)[:, None]
        if SPLITS == 1:
            at = (first + member[:, None]) * D + column[None, :]
            tl.store(output + at, out.to(output.dtype.element_ty), mask=of_group & wide)
        else:
            number = (first + member) * most + split
            tl.store(masses + number, peak + tl.log(mass), mask=member < group)
            tl.store(parts + number[:, None] * D + column[None, :], out, mask=of_group & wide)
    else:
        if LINEAR:
            score = _score(states + row * states_row, weight + head * columns, columns, EPS, COLUMNS)
            score = _with_slope(score, position, slope + head, SLOPE, SLOPE_TOKENS, SLOPE_LENGTH, LEARNED)
            tl.store(fresh_scores + pair, score.to(tl.float32))
    if _arrive(arrived + pair, splits + 1 if LINEAR else splits):
        if split == most:
            target = _slot_of_next(scores, positions, position, slots, window, sinks, CHUNK)
        if SPLITS != 1:
            _join(parts, masses, output, first, group, splits, most, SPLITS_WIDE, MEMBERS, D, DIM)
        to = target.to(tl.int64)
        write = (column < D) & real
        new_key = tl.load(key + row * key_row + head * key_head + column, mask=write)
        new_value = tl.load(value + row * value_row + head * value_head + column, mask=write)
        tl.store(keys + to * D + column, new_key, mask=write)
        tl.store(values + to * D + column, new_value, mask=write)
        if LINEAR:
            score = tl.load(fresh_scores + pair, cache_modifier=".cg")
        else:
            score = tl.load(states + row * states_row + head).to(tl.float64)
            score = _with_slope(score, position, slope + head, SLOPE, SLOPE_TOKENS, SLOPE_LENGTH, LEARNED)
        tl.store(scores + to, score.to(tl.float32), mask=real)
        tl.store(positions + to, position, mask=real)
        if _arrive(arrived + batch * heads, batch * heads):
            for begin in range(0, batch, ROWS):
                index = begin + tl.arange(0, ROWS)
                inside = index < batch
                if INDEXED:
                    state = tl.load(rows + index * rows_step, mask=inside, other=-1).to(tl.int64)
                    count = tl.load(seen + state * seen_row, mask=state >= 0, other=0)
                    tl.store(seen + state * seen_row, count + 1, mask=state >= 0)
                else:
                    count = tl.load(seen + index, mask=inside, other=0)
                    if MASKED:
                        given = tl.load(valid + index.to(tl.int64) * valid_row, mask=inside, other=0) != 0
                        late = tl.load(padded_late + index, mask=inside, other=0) != 0
                        tl.store(padded_late + index, late | (~given & (count > 0)), mask=inside)
                        count += given.to(tl.int64)
                    else:
                        count += 1
                    tl.store(seen + index, count, mask=inside)
            if not INDEXED:
                tl.store(total, tl.load(total) + 1)


@triton.jit
def _load_slots(keys, values, positions, slot, slots, column, D: tl.constexpr):
    """Load keys and values of slots, and whether they are filled; of slots from `slots` on nothing is read."""
    held = tl.load(positions + slot, mask=slot < slots, other=-1) >= 0
    mask = held[:, None] & (column[None, :] < D)
    at = slot[:, None] * D + column[None, :]
    return held, tl.load(keys + at, mask=mask, other=0.0), tl.load(values + at, mask=mask, other=0.0)


@triton.jit
def _with_slope(
    score,
    position,
    slope,
    SLOPE: tl.constexpr,
    SLOPE_TOKENS: tl.constexpr,
    SLOPE_LENGTH: tl.constexpr,
    LEARNED: tl.constexpr,
):
    """Add to a score what its head, whose learned slope stands at `slope`, gives to a position."""
    if LEARNED:
        score += slope_positions(position, SLOPE_LENGTH) * (tl.load(slope).to(tl.float64) / SLOPE_TOKENS + SLOPE)
    else:
        score += slope_positions(position, SLOPE_LENGTH) * SLOPE
    return score


@triton.jit
def _slot_of_next(scores, positions, position, slots, window, sinks, CHUNK: tl.constexpr):
    """Find an empty slot, or that of the weakest key outside the window, of equal ones the latest."""
    free = tl.full([], 0, tl.int32) + slots
    victim, latest = tl.full([], 0, tl.int32), tl.full([], -1, tl.int32)
    last = (position - window).to(tl.int32)
    worst = tl.full([], float("inf"), tl.float32)
    for begin in range(0, slots, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        inside = index < slots
        held = tl.load(positions + index, mask=inside, other=0).to(tl.int32)
        free = tl.minimum(free, tl.min(tl.where(inside & (held < 0), index, slots), 0))
        eligible = inside & (held >= sinks) & (held <= last)
        score = tl.load(scores + index, mask=inside, other=0.0)
        score = tl.where(eligible, score, float("inf"))
        low = tl.min(score, 0)
        weakest = tl.where(eligible & (score == low), held, -1)
        late = tl.max(weakest, 0)
        better = (low < worst) | ((low == worst) & (late > latest))
        place = tl.min(tl.where(inside & (weakest == late), index, slots), 0)
        worst, latest = tl.where(better, low, worst), tl.where(better, late, latest)
        victim = tl.where(better, place, victim)
    return tl.where(free < slots, free, victim)


@triton.jit
def _score(states, weight, columns, EPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Score one row by one head in float64; `hf_sparse.ops.selection.triton.linear_scores` defines the score."""
    total, squares = tl.zeros([COLUMNS], tl.float64), tl.zeros([COLUMNS], tl.float64)
    product, weights = tl.zeros([COLUMNS], tl.float64), tl.zeros([COLUMNS], tl.float64)
    for begin in range(0, columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        x = tl.load(states + column, mask=column < columns, other=0.0).to(tl.float64)
        w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float64)
        total += x
        squares += x * x
        weights += w
        product += x * w
    mean = tl.sum(total, 0) / columns
    variance = tl.maximum(tl.sum(squares, 0) / columns - mean * mean, 0.0)
    return (tl.sum(product, 0) - mean * tl.sum(weights, 0)) / tl.sqrt(variance + EPS)


@triton.jit
def _arrive(counter, EXPECTED):
    """Count this program as done, and tell whether it is the last: then all others have read and written."""
    tl.debug_barrier()  # all threads of this program are done before one of them counts it
    last = tl.atomic_add(counter, 1, sem="acq_rel") == EXPECTED - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _join(
    parts,
    masses,
    output,
    first,
    group,
    splits,
    most,
    SPLITS_WIDE: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """Average the results of the `splits` programs of the query heads of a KV head, weighted by their masses.

    They stand in memory with room for those of `most` programs.
    """
    member, column, every = tl.arange(0, MEMBERS), tl.arange(0, DIM), tl.arange(0, SPLITS_WIDE)
    inside = member < group
    mask = inside[:, None] & (column[None, :] < D)
    # Others wrote them: never from this multiprocessor's own cache.
    number = (first + member) * most
    exists = inside[:, None] & (every[None, :] < splits)
    at = masses + number[:, None] + every[None, :]
    log_masses = tl.load(at, mask=exists, other=-float("inf"), cache_modifier=".cg")
    peak = tl.max(log_masses, 1)
    anchor = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp(log_masses - anchor[:, None]), 1)
    out = tl.zeros([MEMBERS, DIM], tl.float32)
    # Sixteen loads at a time; what they leave over would be loaded one after another without the masks.
    for split in tl.range(0, (splits + 15) // 16 * 16, loop_unroll_factor=16):
        there, wanted = inside & (split < splits), mask & (split < splits)
        log_mass = tl.load(masses + number + split, mask=there, other=-float("inf"), cache_modifier=".cg")
        of_split = parts + (number[:, None] + split) * D + column[None, :]
        part = tl.load(of_split, mask=wanted, other=0.0, cache_modifier=".cg")
        out += part * tl.exp(log_mass - anchor)[:, None]
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    at = (first + member[:, None]) * D + column[None, :]
    tl.store(output + at, out.to(output.dtype.element_ty), mask=mask)
