"""Read a text from its beginning on in few launches: score its tokens, attend if keys leave, and fill new KV slots.

That is what the layer of a prefill does without gradients. Called one after another, the functions that do it take
more time on the host than the rest of a layer; here the launches of all are noted together (`ops.triton.replay`), and
the slots are allocated among the buffers of the kernels that fill them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.selection.triton.attention import _TILE, CausalSettings, _causal_forward
from hf_sparse.ops.selection.triton.linear_scores import write_scores
from hf_sparse.ops.selection.triton.slot_filling import fill
from hf_sparse.ops.triton.launch import compile_ahead, launch
from hf_sparse.ops.triton.replay import empty, replayed

_ROWS = 32  # slots that a program copies


class ReadingSettings(NamedTuple):
    """Hold the settings of a call.

    Attributes:
        k, window, sinks: the budget.
        scaling: multiplies the logits.
        position_slope, slope_tokens: of the scores, see `ops.selection.linear_scores.token_scores`.
    """

    k: int
    window: int
    sinks: int
    scaling: float
    position_slope: float
    slope_tokens: int

    @property
    def slots(self) -> int:
        """Return the number of slots."""
        return self.k + self.window + self.sinks


class Slots(NamedTuple):
    """Hold new slots and what belongs to them; shapes as in `ops.selection.slots.fill_slots`.

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
) -> tuple[Tensor | None, Slots]:
    """Read texts without padding, hard gates, no gradient.

    Args:
        query: `[B, Hq, T, D]`; key, value: `[B, Hkv, T, D]`, of one dtype, their last dimension contiguous.
        states: `[B, T, C]`, contiguous; weight, slope: of the scores, contiguous.
        settings: see `ReadingSettings`.

    Returns:
        The output `[B, Hq, T, D]`, `None` where all keys fit into the slots, so that dense attention has it, and the
        new slots.
    """
    if key.shape[2] <= settings.slots:
        results = replayed(_take_all, (key, value, states, weight, slope), settings)
        return None, Slots(*results)  # type: ignore[arg-type]
    output, *slots = replayed(_select, (query, key, value, states, weight, slope), settings)
    return output, Slots(*slots)  # type: ignore[arg-type]


def _new_slots(key: Tensor, settings: ReadingSettings) -> Slots:
    batch, heads, _, dim = key.shape
    shape, device = (batch, heads, settings.slots), key.device
    return Slots(
        empty((*shape, dim), key.dtype, device),
        empty((*shape, dim), key.dtype, device),
        empty(shape, torch.float32, device),
        empty(shape, torch.int64, device),
        empty((batch,), torch.int64, device),
        empty((batch,), torch.bool, device),
        empty((), torch.int64, device),
    )


def _take_all(
    key: Tensor, value: Tensor, states: Tensor, weight: Tensor, slope: Tensor | None, settings: ReadingSettings
) -> tuple[Tensor | None, ...]:
    """Score the tokens and give each a slot."""
    slots = _new_slots(key, settings)
    (batch, heads, number), dim = slots.scores.shape, key.shape[3]
    slopes = {"position_slope": settings.position_slope, "slope_tokens": settings.slope_tokens}
    write_scores(states, weight, slope, None, slots.scores, **slopes)  # type: ignore[arg-type]
    launch(_copy_all, (triton.cdiv(number, _ROWS), batch, heads))(
        key, value, *slots, *key.stride()[:3], *value.stride()[:3], key.shape[2], number, dim,
        ROWS=_ROWS, DIM=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return tuple(slots)


def _select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    settings: ReadingSettings,
) -> tuple[Tensor | None, ...]:
    """Score the tokens, attend, and keep those that later tokens can attend to."""

    def output(*tensors: Any) -> Any:
        arguments: tuple[Any, ...] = (*tensors, settings)
        return _launch(*arguments)[0]

    compile_ahead(output, query, key, value, states, weight, slope, family=read_text)
    return _launch(query, key, value, states, weight, slope, settings)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    settings: ReadingSettings,
) -> tuple[Tensor | None, ...]:
    k, window, sinks, scaling, position_slope, slope_tokens = settings
    scores = empty((*key.shape[:2], key.shape[2]), torch.float32, key.device)
    write_scores(states, weight, slope, None, scores, position_slope=position_slope, slope_tokens=slope_tokens)
    causal = CausalSettings(k, window, sinks, False, scaling, k, _TILE, None)
    (output,) = _causal_forward(query, key, value, scores, None, causal, False)
    slots = _new_slots(key, settings)
    state = (slots.keys, slots.values, slots.scores, slots.positions, slots.seen)
    fill(*state, key, value, scores, window, sinks, slots.padded_late, slots.tokens)
    return (output, *slots)


@triton.jit(do_not_specialize=["length", "slots"])
def _copy_all(
    Key,
    Value,
    keys,
    values,
    scores,
    positions,
    seen,
    Late,
    Count,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    length,
    slots,
    dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Copy keys and values into ROWS slots, and write what belongs to these; the scores of tokens are there already."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    base = (row * tl.num_programs(2) + head) * slots
    slot, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    taken, there = slot < length, slot < slots
    tl.store(positions + base + slot, tl.where(taken, slot, -1).to(tl.int64), mask=there)
    tl.store(scores + base + slot, tl.zeros([ROWS], tl.float32), mask=there & (slot >= length))
    source, target = taken[:, None] & (column < dim)[None, :], there[:, None] & (column < dim)[None, :]
    to, of = (base + slot)[:, None] * dim + column[None, :], slot.to(tl.int64)[:, None]
    of_key = row * key_batch + head * key_head + of * key_row + column[None, :]
    tl.store(keys + to, tl.load(Key + of_key, mask=source, other=0.0), mask=target)
    of_value = row * value_batch + head * value_head + of * value_row + column[None, :]
    tl.store(values + to, tl.load(Value + of_value, mask=source, other=0.0), mask=target)
    if tl.program_id(0) + head == 0:
        tl.store(seen + row, length.to(tl.int64))
        tl.store(Late + row, 0)
        tl.store(Count, length.to(tl.int64), mask=row == 0)
