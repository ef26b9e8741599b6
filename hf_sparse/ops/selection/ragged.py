"""Take decoding steps over KV slots of which each head has a number of its own, one after another in one buffer.

`[B, R, ...]` in place of the `[B, Hkv, S, ...]` of `slots`, with `R` the slots of all heads: those of head h stand
from `offsets[h]` up to `offsets[h + 1]`. The numbers are fixed before a text begins, so shapes never change and nothing
waits for a value from the device here either. On a GPU all heads run in one kernel; elsewhere, and for what the kernels
do not take, one after another as `slots` has it.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hf_sparse.ops.selection import slots

# A recorded graph reads them for as long as it lives, so none is dropped.
_offsets: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
_counts: dict[tuple[torch.device, int], tuple[int, ...]] = {}  # by the address of the offsets


def offsets_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return where the slots of each head begin, and where the last ones end, `[Hkv + 1]` int32; not to be written to.

    Every prefill asks for those of all layers again, and copying them to a device would take longer than the look.
    """
    if torch.compiler.is_compiling():  # such a tensor has no content
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
    return known_offsets(counts, device)


def known_offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return what `offsets_of` returns where nothing is compiled, also to what runs while something else is."""
    key = (device, tuple(counts))
    if key not in _offsets:
        with torch.inference_mode(False):
            offsets = _offsets[key] = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        _counts[offsets.device, offsets.data_ptr()] = tuple(counts)
    return _offsets[key]


def counts_of(offsets: Tensor) -> tuple[int, ...]:
    """Return the numbers of slots behind the result of `offsets_of`; of other offsets they are read from the device.

    Code that is compiled for one layer runs for others whose numbers differ, so it cannot hold them.
    """
    counts = _counts.get((offsets.device, offsets.data_ptr()))
    return tuple(offsets.diff().tolist()) if counts is None else counts


def of_heads(tensor: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Yield the part `[B, 1, S, ...]` of each head of a buffer `[B, R, ...]`, in the same memory."""
    for begin, end in pairwise([0, *accumulate(counts)]):
        yield tensor[:, begin:end].unsqueeze(1)


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
    counts: Sequence[int],
    offsets: Tensor,
    window: int,
    sinks: int,
) -> None:
    """Write the next token of each row into a slot of every head, as `slots.insert_token` does.

    Args:
        keys, values: `[B, R, D]`; scores, positions: `[B, R]`, all written in place.
        seen, key, value, score, valid, window, sinks: as there.
        counts: slots of each head.
        offsets: of these counts, see `offsets_of`.
    """
    insert = _insert_operator if torch.compiler.is_compiling() else _insert
    tokens = (key, value, score, valid)
    insert(keys, values, scores, positions, seen, *tokens, list(counts), offsets, window, sinks)


def _insert(
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    seen: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    valid: Tensor | None,
    counts: Sequence[int],
    offsets: Tensor,
    window: int,
    sinks: int,
) -> None:
    """Insert as `insert_token`, in one kernel or head by head."""
    if slots.has_kernels(keys, values, scores, positions):
        from hf_sparse.ops.selection.triton import slots as kernels

        kernels.insert_token(
            keys, values, scores, positions, seen, key, value, score, valid,
            window=window, sinks=sinks, counts=counts, offsets=offsets,
        )  # fmt: skip
        return
    buffers = (of_heads(tensor, counts) for tensor in (keys, values, scores, positions))
    for head, (k, v, s, p) in enumerate(zip(*buffers, strict=True)):
        one = slice(head, head + 1)
        token = (key[:, one], value[:, one], score[:, one], valid)
        slots.insert_token(k, v, s, p, seen, *token, window=window, sinks=sinks)


_insert_operator = torch.library.custom_op(
    "hf_sparse::insert_token_by_heads", _insert, mutates_args=("keys", "values", "scores", "positions")
)
_insert_operator.register_fake(lambda *tensors: None)


def attend_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    *,
    counts: Sequence[int],
    offsets: Tensor,
    scaling: float,
) -> Tensor:
    """Attend with one query per row and head to all filled slots of the head, as `slots.attend_slots` does.

    Args:
        query: `[B, Hq, 1, D]`, `Hq` a multiple of `Hkv`.
        keys, values: `[B, R, D]`.
        positions: `[B, R]` int64, -1 for an empty slot; `None` if no slot is empty.
        counts, offsets: as in `insert_token`.
        scaling: multiplies the logits.

    Returns:
        `[B, Hq, 1, D]` in the dtype of `query`.
    """
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and query.requires_grad):
        return _attend_operator(query, keys, values, positions, list(counts), offsets, scaling)
    return _attend(query, keys, values, positions, counts, offsets, scaling)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    counts: Sequence[int],
    offsets: Tensor,
    scaling: float,
) -> Tensor:
    """Attend as `attend_slots`, in kernels or head by head."""
    trains = torch.is_grad_enabled() and query.requires_grad
    fits = not trains and query.dtype == keys.dtype
    if fits and positions is not None and slots.has_kernels(keys, values, positions):
        from hf_sparse.ops.selection.triton import slots as kernels

        return kernels.attend_slots(query, keys, values, positions, scaling=scaling, counts=counts, offsets=offsets)
    tables = [None] * len(counts) if positions is None else of_heads(positions, counts)
    buffers = zip(query.chunk(len(counts), 1), of_heads(keys, counts), of_heads(values, counts), tables, strict=True)
    return torch.cat([slots.attend_slots(*head, scaling=scaling) for head in buffers], 1)


@torch.library.custom_op("hf_sparse::attend_slots_by_heads", mutates_args=())
def _attend_operator(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    counts: Sequence[int],
    offsets: Tensor,
    scaling: float,
) -> Tensor:
    """Attend as `attend_slots` without a gradient; the result is contiguous."""
    return _attend(query, keys, values, positions, counts, offsets, scaling).contiguous()


@_attend_operator.register_fake
def _(query: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.shape)


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
    counts: Sequence[int],
    offsets: Tensor,
    window: int,
    sinks: int,
) -> None:
    """Write what each head keeps of a text without padding into its slots, as `slots.fill_slots` does.

    Args:
        keys, values, scores, positions, counts, offsets: as in `insert_token`, the first four written in place; what
            empty slots hold as keys and values stays.
        seen, key, value, score, window, sinks: as in `slots.fill_slots`.
    """
    if slots.fills_by_kernels(keys, values, scores, positions, key, value, score):
        from hf_sparse.ops.selection.triton import slot_filling

        tokens = (keys, values, scores, positions, seen, key, value, score)
        slot_filling.fill_slots(*tokens, window=window, sinks=sinks, most=max(counts), offsets=offsets)
        return
    buffers = (of_heads(tensor, counts) for tensor in (keys, values, scores, positions))
    for head, (k, v, s, p) in enumerate(zip(*buffers, strict=True)):
        one = slice(head, head + 1)
        slots.fill_slots(k, v, s, p, seen, key[:, one], value[:, one], score[:, one], window=window, sinks=sinks)
