"""Read a text from its beginning on in few launches: score its tokens, attend, and fill new KV slots.

That is what the layer of a prefill does without gradients. Called one after another, the functions that do it take
more time on the host than the rest of a layer; here the launches of all are noted together (`ops.triton.replay`), and
the slots are allocated among the buffers of the kernels that fill them.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.causal_attention import is_short
from hf_sparse.ops.selection.linear_scores import Slopes
from hf_sparse.ops.selection.ragged import offsets_of
from hf_sparse.ops.selection.thresholds import ScanPlan
from hf_sparse.ops.selection.triton import linear_scores
from hf_sparse.ops.selection.triton.attention import TILE, counts_on
from hf_sparse.ops.selection.triton.attention_forward import forward
from hf_sparse.ops.selection.triton.linear_scores import head_slopes, row_scores, slope_positions, write_scores
from hf_sparse.ops.selection.triton.lists import selection_tables
from hf_sparse.ops.selection.triton.scan import launch_selection, list_class
from hf_sparse.ops.selection.triton.slots import slots_of_head
from hf_sparse.ops.stacked import Kind, Places, places_of
from hf_sparse.ops.triton.causal_attention import launch_attention
from hf_sparse.ops.triton.launch import compile_ahead, launch
from hf_sparse.ops.triton.replay import Program, empty, program_of, replayed

_TOKENS = 4  # slots that a program fills where all keys have one
_ROWS = 64  # slots that a program fills where keys leave
_KEYS = 2048  # that a program looks at together


class ReadingSettings(NamedTuple):
    """Hold the settings of a call.

    Attributes:
        k, window, sinks: the budget; where heads differ `k` is that of the head that selects most keys, or more.
        scaling: multiplies the logits.
        slopes: of the scores, see `ops.selection.linear_scores.Slopes`.
        k_of_heads: of each KV head where they differ; their slots are those of `ops.selection.ragged` then.
    """

    k: int
    window: int
    sinks: int
    scaling: float
    slopes: Slopes
    k_of_heads: tuple[int, ...] | None = None

    @property
    def slots(self) -> int:
        """Return the number of slots of a KV head; where they differ of the one that has most, or more."""
        return self.k + self.window + self.sinks

    @property
    def counts(self) -> int | tuple[int, ...]:
        """Return the number of slots of each KV head, a number where it is the same for all."""
        if self.k_of_heads is None:
            return self.slots
        return tuple([k + self.window + self.sinks for k in self.k_of_heads])

    @property
    def fewest_slots(self) -> int:
        """Return the number of slots of the KV head that has the fewest: as many tokens have a slot in every head."""
        return self.slots if self.k_of_heads is None else min(self.k_of_heads) + self.window + self.sinks

    def tables(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return what the kernels read of heads that differ: their numbers of keys, and where their slots begin."""
        return (None, None) if self.k_of_heads is None else tables_of_heads(self.k_of_heads, self.counts, device)


def tables_of_heads(k: Sequence[int], counts: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the kernels read of heads with `k` selected keys and `counts` slots each, see `ReadingSettings`."""
    return counts_of_heads(k, device), offsets_of(counts, device)


def counts_of_heads(k: Sequence[int], device: torch.device) -> Tensor:
    """Return the first of these tables, `[2, Hkv]` int32."""
    return counts_on(device, tuple([(number, number) for number in k]))


class Slots(NamedTuple):
    """Hold new slots and what belongs to them; shapes as in `ops.selection.slots.fill_slots`, or as in `ragged`.

    Attributes:
        keys, values, scores, positions: those of the slots; of empty ones 0, 0, 0 and -1.
        seen: `[B]` int64, tokens of each row.
        padded_late: `[B]` bool, False.
        tokens: int64 without dimensions, the number of tokens.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor
    seen: Tensor
    padded_late: Tensor
    tokens: Tensor


def read_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    settings: ReadingSettings,
    end: Tensor | None = None,
) -> tuple[Tensor | None, Slots]:
    """Read texts without padding, hard gates, no gradient.

    Args:
        query: `[B, Hq, T, D]`; key, value: `[B, Hkv, T, D]`, of one dtype, their last dimension contiguous.
        states: `[B, T, C]`, contiguous; weight, slope: of the scores, contiguous.
        settings: see `ReadingSettings`.
        end: `[1]` int64, up to `T`, where the texts end of which more is read: the slots are those of so many tokens;
            `None` for `T`.

    Returns:
        The output `[B, Hq, T, D]`, and the new slots. `None` for the output where all keys fit into the slots and SDPA
        is to attend: the text is not short, or it is recorded, as one with `end` is.
    """
    slots = new_slots(key, settings.counts)
    function, tensors = _reading((query, key, value, states, weight, slope), slots, settings, end)
    results = replayed(function, tensors, settings)
    return results[0] if results else None, slots


def _reading(
    inputs: tuple[Any, ...], slots: Slots, settings: ReadingSettings, end: Tensor | None
) -> tuple[Callable[..., tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]:
    """Return the function that reads a text, whose launches are noted, and the tensors that it takes.

    Args:
        inputs: query, key, value, states, weight and slope.
        slots, settings, end: see `read_text`.
    """
    query, *others = inputs
    others += (*slots, *settings.tables(query.device), end)
    if query.shape[2] > settings.fewest_slots:
        return _select, (query, *others)
    if end is None and is_short(query):
        return _take_all_and_attend, (query, *others)
    return _take_all, tuple(others)


def attend_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    settings: ReadingSettings,
) -> Tensor:
    """Attend as `read_text` to texts of more tokens than some head has slots, and keep nothing: `[B, Hq, T, D]`."""
    counts, _ = settings.tables(key.device)
    (output,) = replayed(_select_alone, (query, key, value, states, weight, slope, counts), settings)
    assert output is not None
    return output


def noted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    settings: ReadingSettings,
) -> Program | None:
    """Return the launches of `attend_text` for tensors of this layout, if a call has noted them.

    They are for tensors at multiples of 16 bytes: query, key, value, states, weight, slope, and the first table of the
    settings. They return the output.
    """
    counts, _ = settings.tables(key.device)
    return program_of(_select_alone, (query, key, value, states, weight, slope, counts), settings)


def noted_reading(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    slots: Slots,
    settings: ReadingSettings,
    end: Tensor | None = None,
) -> Program | None:
    """Return the launches of `read_text` for tensors of this layout, if a call has noted them.

    They are for tensors at multiples of 16 bytes: query, key, value, states, weight, slope, those of the slots, the
    tables of the settings, and `end`. They return the output; or nothing, and take no query, where `read_text` returns
    none. Of heads that differ they are those of all layers with the same `settings.slots`.
    """
    function, tensors = _reading((query, key, value, states, weight, slope), slots, settings, end)
    return program_of(function, tensors, settings)


@functools.lru_cache(maxsize=64)
def places_of_slots(
    batch: int, heads: int, dim: int, dtype: torch.dtype, counts: tuple[int | tuple[int, ...], ...]
) -> Places:
    """Return where the slots of several layers lie in one piece of memory.

    The host sets the pace of short texts, and to it an allocation costs about as much as a launch.

    Args:
        batch, heads: rows and KV heads.
        dim, dtype: of a key.
        counts: for each layer the slots of a KV head, or those of each of them.

    Returns:
        The tensors of the first layer in the order of `Slots`, then those of the next.
    """
    return places_of([kind for of_layer in counts for kind in _kinds_of_slots(batch, heads, dim, dtype, of_layer)])


def new_slots(key: Tensor, counts: int | tuple[int, ...]) -> Slots:
    """Allocate slots for keys `[B, Hkv, T, D]`: a number per KV head, or a number for each of them."""
    batch, heads, _, dim = key.shape
    kinds = _kinds_of_slots(batch, heads, dim, key.dtype, counts)
    return Slots(*[torch.empty(shape, dtype=dtype, device=key.device) for shape, dtype in kinds])


def _kinds_of_slots(
    batch: int, heads: int, dim: int, dtype: torch.dtype, counts: int | tuple[int, ...]
) -> Iterator[Kind]:
    """Yield shape and dtype of each tensor of the slots of a layer."""
    shape = (batch, heads, counts) if isinstance(counts, int) else (batch, sum(counts))
    yield from (((*shape, dim), dtype), ((*shape, dim), dtype), (shape, torch.float32), (shape, torch.int64))
    yield from (((batch,), torch.int64), ((batch,), torch.bool), ((), torch.int64))


def _take_all(
    key: Tensor, value: Tensor, states: Tensor, weight: Tensor, slope: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """Score the tokens and give each a slot; `rest`: the slots, the tables of the settings, the end, the settings."""
    *of_slots, _, offsets, end, settings = rest
    batch, heads, length, dim = key.shape
    together = min(linear_scores.HEADS, triton.next_power_of_2(heads))
    launch(_score_and_copy, (triton.cdiv(settings.slots, _TOKENS), triton.cdiv(heads, together), batch))(
        states, weight, slope, key, value, *of_slots, offsets, end, *key.stride()[:3], *value.stride()[:3],
        length, settings.slots, heads, states.shape[-1], dim,
        EPS=linear_scores.EPS, TOKENS=_TOKENS, HEADS=together, COLUMNS=linear_scores.COLUMNS,
        STAGES=linear_scores.STAGES, SLOPE=settings.slopes.position_slope, SLOPE_TOKENS=settings.slopes.tokens,
        SLOPE_LENGTH=settings.slopes.length, DIM=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return ()


def _take_all_and_attend(query: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    """Do what `_take_all` does with the other arguments, and attend to all keys."""
    *tensors, settings = others

    def output(query: Tensor, *tensors: Any) -> Tensor:
        _take_all(*tensors, settings)
        return launch_attention(query, tensors[0], tensors[1], settings.scaling)

    family = _family(settings, query.shape[2], True)
    compile_ahead(output, query, *tensors, family=family)
    return (output(query, *tensors),)


def _select(
    query: Tensor, key: Tensor, value: Tensor, states: Tensor, weight: Tensor, slope: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """Score the tokens, attend, and keep those that later tokens can attend to; `rest` as in `_take_all`."""

    *others, settings = rest

    def output(*tensors: Any) -> Any:
        return _launch(*tensors, settings=settings)[0]

    family = _family(settings, key.shape[2], others[-1] is None)
    compile_ahead(output, query, key, value, states, weight, slope, *others, family=family)
    return _launch(query, key, value, states, weight, slope, *others, settings=settings)


def compile_readings(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    kinds: Sequence[ReadingSettings],
) -> None:
    """Compile, side by side, what `read_text` launches for such texts with several settings, with an end and without.

    Args:
        query, key, value, states, weight, slope: as in `read_text`.
        kinds: the settings of the layers of a model.
    """
    length, heads, meta = key.shape[2], key.shape[1], torch.device("meta")
    cases = {
        _family(settings, length, is_whole): (
            settings,
            None if is_whole else torch.empty(1, dtype=torch.int64, device=meta),
        )
        for settings in kinds
        for is_whole in (True, False)
    }

    def all_readings(query: Tensor, key: Tensor, *others: Any) -> Tensor:
        output: Any = query
        value = others[0]
        for settings, end in cases.values():
            slots = new_slots(key, settings.counts)
            tables: list[Tensor | None] = [None, None]
            if settings.k_of_heads is not None:
                tables = [torch.empty(size, dtype=torch.int32, device=meta) for size in ((2, heads), (heads + 1,))]
            if length <= settings.fewest_slots:
                _take_all(key, *others, *slots, *tables, end, settings)
                if end is None and is_short(query):
                    output = launch_attention(query, key, value, settings.scaling)
            else:
                output = _launch(query, key, *others, *slots, *tables, end, settings=settings)[0]
        return output

    compile_ahead(all_readings, query, key, value, states, weight, slope, family=tuple(cases))


def _family(settings: ReadingSettings, length: int, is_whole: bool) -> Hashable:
    """Return what differs between calls that launch different kernels: for texts of a length, whole or with an end."""
    selects = None if length <= settings.fewest_slots else list_class(min(settings.k, length))
    return read_text, settings.k_of_heads is None, is_whole, selects


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    *others: Any,
    settings: ReadingSettings,
) -> tuple[Tensor | None, ...]:
    *of_slots, counts, offsets, end = others
    slots = Slots(*of_slots)
    batch, heads, length, dim = key.shape
    output, scores, until = _attend(settings, query, key, value, states, weight, slope, counts)
    strides = (*key.stride()[:3], *value.stride()[:3])
    launch(_keep, (triton.cdiv(settings.slots, _ROWS), batch, heads))(
        until, scores, key, value, *slots, offsets, end, *strides, length, settings.slots, dim,
        KEYS=_KEYS, ROWS=_ROWS, DIM=triton.next_power_of_2(dim), num_warps=8,
    )  # fmt: skip
    return (output,)


def _select_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    counts: Tensor | None,
    settings: ReadingSettings,
) -> tuple[Tensor | None, ...]:
    """Score the tokens and attend; `counts` is the first of the tables of the settings."""

    def output(*tensors: Any) -> Any:
        return _attend(settings, *tensors)[0]

    tensors = (query, key, value, states, weight, slope, counts)
    compile_ahead(output, *tensors, family=(attend_text, counts is None, list_class(min(settings.k, key.shape[2]))))
    return (output(*tensors),)


def _attend(
    settings: ReadingSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the scores, and until which query each key is attended to."""
    k, window, sinks, scaling, slopes, _ = settings
    length = key.shape[2]
    scores = empty(key.shape[:3], torch.float32, key.device)
    write_scores(states, weight, slope, None, scores, slopes)
    plan = ScanPlan(k, min(k, length), query.shape[2], window, TILE, False, True)
    selection = launch_selection(scores, plan, None, sinks, counts)
    tables = selection_tables(selection, query.shape[2], None, window=window, sinks=sinks, tile=TILE)
    output, _ = forward(query, key, value, None, None, tables, scaling)
    return output, scores, tables.until


@triton.jit(do_not_specialize=["length", "slots"])
def _score_and_copy(
    states, weight, Slope, Key, Value, keys, values, scores, positions, seen, Late, Count, Offsets, End, key_batch,
    key_head, key_row, value_batch, value_head, value_row, length, slots, heads, columns, dim,
    EPS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    SLOPE: tl.constexpr, SLOPE_TOKENS: tl.constexpr, SLOPE_LENGTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write TOKENS slots of HEADS heads: score the tokens, copy keys and values, and empty the slots after the end."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot, there = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), head < heads
    tokens = length if End is None else tl.load(End).to(tl.int32)
    taken = slot < tokens
    read = tl.where(tl.program_id(0) * TOKENS < tokens, columns, 0)
    score, _, _, _ = row_scores(
        states, weight, row * length + slot, taken, head, there, columns, read, EPS, TOKENS, HEADS, COLUMNS, STAGES
    )
    risen = slope_positions(slot, SLOPE_LENGTH)
    score += risen[:, None] * head_slopes(Slope, head, there, SLOPE, SLOPE_TOKENS, HEADS)[None, :]
    if Offsets is None:
        base, end = (row * heads + head) * slots, tl.zeros([HEADS], tl.int32) + slots
    else:
        begin = tl.load(Offsets + head, mask=there, other=0)
        end = tl.load(Offsets + head + 1, mask=there, other=0) - begin
        base = row * tl.load(Offsets + heads) + begin
    to, written = base[None, :] + slot[:, None], there[None, :] & (slot[:, None] < end[None, :])
    tl.store(scores + to, tl.where(taken[:, None], score, 0.0).to(tl.float32), mask=written)
    tl.store(positions + to, tl.where(taken, slot, -1).to(tl.int64)[:, None] + tl.zeros_like(to), mask=written)
    column = tl.arange(0, DIM)[None, None, :]
    written = written[:, :, None] & (column < dim)
    held, to = written & taken[:, None, None], to[:, :, None] * dim + column
    slot, head = slot.to(tl.int64)[:, None, None], head.to(tl.int64)[None, :, None]
    of_key = row * key_batch + head * key_head + slot * key_row + column
    tl.store(keys + to, tl.load(Key + of_key, mask=held, other=0.0), mask=written)
    of_value = row * value_batch + head * value_head + slot * value_row + column
    tl.store(values + to, tl.load(Value + of_value, mask=held, other=0.0), mask=written)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(seen + row, tokens.to(tl.int64))
        tl.store(Late + row, 0)
        tl.store(Count, tokens.to(tl.int64), mask=row == 0)


@triton.jit(do_not_specialize=["length", "slots"])
def _keep(
    Until, Score, Key, Value, keys, values, scores, positions, seen, Late, Count, Offsets, End, key_batch, key_head,
    key_row, value_batch, value_head, value_row, length, slots, dim,
    KEYS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Fill ROWS slots of a head with keys that the query before the end attends to, in rising order.

    These are what a later query can attend to: the sinks, the window and the best of the others. Every program counts
    them from the beginning of the text on, for a launch costs more than that."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    number = row * tl.num_programs(2) + head
    Until += number * length
    Score += number * length
    base, slots = slots_of_head(Offsets, row, head, tl.num_programs(2), slots)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, slots)  # scores that are no numbers have no order, and more keys may stay
    tokens = length if End is None else tl.load(End).to(tl.int32)
    place = tl.full([], 0, tl.int32)
    for begin in range(0, tokens, KEYS):
        key = begin + tl.arange(0, KEYS)
        stays = tl.load(Until + key, mask=key < tokens, other=0) >= tokens
        slot = place + tl.cumsum(stays.to(tl.int32), 0) - 1
        place += tl.sum(stays.to(tl.int32), 0)
        stays = stays & (slot >= first) & (slot < last)
        tl.store(positions + base + slot, key.to(tl.int64), mask=stays)
        tl.store(scores + base + slot, tl.load(Score + key, mask=stays, other=0.0), mask=stays)
    slot, column = first + tl.arange(0, ROWS), tl.arange(0, DIM)
    there = slot < last
    empty = there & (slot >= place)
    tl.store(positions + base + slot, tl.full([ROWS], -1, tl.int64), mask=empty)
    tl.store(scores + base + slot, tl.zeros([ROWS], tl.float32), mask=empty)
    tl.debug_barrier()  # other threads wrote the positions
    kept = tl.load(positions + base + slot, mask=there, other=-1)[:, None]
    mask = there[:, None] & (column < dim)[None, :]
    held, to = mask & (kept >= 0), (base + slot)[:, None] * dim + column[None, :]
    of_key = row * key_batch + head * key_head + kept * key_row + column[None, :]
    tl.store(keys + to, tl.load(Key + of_key, mask=held, other=0.0), mask=mask)
    of_value = row * value_batch + head * value_head + kept * value_row + column[None, :]
    tl.store(values + to, tl.load(Value + of_value, mask=held, other=0.0), mask=mask)
    if tl.program_id(0) + head == 0:
        tl.store(seen + row, tokens.to(tl.int64))
        tl.store(Late + row, 0)
        tl.store(Count, tokens.to(tl.int64), mask=row == 0)
