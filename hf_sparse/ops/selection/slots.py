"""Take one decoding step over a fixed number of KV slots: put the new token into a slot, attend to the slots.

Shapes never change and nothing waits for a value from the device, so that a step can be compiled and recorded as a
CUDA graph. On a GPU both are Triton kernels; elsewhere, and for what those do not take, plain PyTorch.

Compiled code calls both as operators that it does not look into: tracing the kernels of every layer took seconds.

A slot has the position of its token in its row, -1 while it is empty. The first `sinks` tokens and the last `window`
ones keep their slots; of the others the weakest leaves when a new one comes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.triton import DTYPES, MOST_ROWS, installed, is_on_gpu

_TRITON = installed()


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
) -> None:
    """Write the next token of each row into an empty slot, or into that of the weakest key outside the window.

    Of equal scores the lower position wins, so the later key leaves. `seen` is not changed.

    Args:
        keys, values: `[B, Hkv, S, D]`, written in place.
        scores: `[B, Hkv, S]` float32, written in place.
        positions: `[B, Hkv, S]` int64, -1 for an empty slot, written in place.
        seen: `[B]` int64, tokens of each row so far: the position of the new one.
        key, value: `[B, Hkv, 1, D]` in the dtype of `keys`.
        score: `[B, Hkv, 1]`.
        valid: `[B]` bool, rows whose token is real; the others write nothing. `None` if all are.
    """
    insert = _insert_operator if torch.compiler.is_compiling() else _insert
    insert(keys, values, scores, positions, seen, key, value, score, valid, window, sinks)


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
    window: int,
    sinks: int,
) -> None:
    """Insert as `insert_token`, in one kernel or in plain PyTorch."""
    if has_kernels(keys, values, scores, positions):
        from hf_sparse.ops.selection.triton import slots

        slots.insert_token(keys, values, scores, positions, seen, key, value, score, valid, window=window, sinks=sinks)
        return
    position = seen[:, None, None]
    empty = positions < 0
    eligible = (positions >= sinks) & (positions <= position - window)
    old = scores.masked_fill(~eligible, torch.inf)
    weakest = eligible & (old == old.amin(-1, keepdim=True))
    # Of equal scores the lower index wins, so the later key leaves.
    victim = positions.masked_fill(~weakest, -1).argmax(-1, keepdim=True)
    slot = torch.where(empty.any(-1, keepdim=True), empty.int().argmax(-1, keepdim=True), victim)
    slot_index = slot[..., None].expand_as(key)
    if valid is not None:  # a padded row writes back what the slot holds
        real = valid[:, None, None]
        key = torch.where(real[..., None], key, keys.gather(2, slot_index))
        value = torch.where(real[..., None], value, values.gather(2, slot_index))
        score = torch.where(real, score, scores.gather(2, slot))
        position = torch.where(real, position, positions.gather(2, slot))
    keys.scatter_(2, slot_index, key)
    values.scatter_(2, slot_index, value)
    scores.scatter_(2, slot, score.float())
    positions.scatter_(2, slot, position.expand_as(slot))


_insert_operator = torch.library.custom_op(
    "hf_sparse::insert_token", _insert, mutates_args=("keys", "values", "scores", "positions")
)
_insert_operator.register_fake(lambda *tensors: None)


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
) -> None:
    """Write the sinks, the window and the best-scored other tokens of a text without padding, in order, into slots.

    Args:
        keys, values, scores, positions, seen: as in `insert_token`, written in place; what empty slots hold as keys
            and values stays.
        key, value: `[B, Hkv, N, D]`, all tokens of the text.
        score: `[B, Hkv, N]` float32.
    """
    slots, number = keys.shape[2], key.shape[2]
    if fills_by_kernels(keys, values, scores, positions, key, value, score):
        from hf_sparse.ops.selection.triton import slot_filling

        state = (keys, values, scores, positions, seen)
        slot_filling.fill_slots(*state, key, value, score, window=window, sinks=sinks)
        return
    index = torch.arange(number, device=key.device)
    if number > slots:
        always_kept = (index >= number - window) | (index < sinks)
        order = score.masked_fill(always_kept, torch.inf).argsort(dim=-1, descending=True, stable=True)
        kept = order[..., :slots].sort(dim=-1).values
        key, value = (x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (key, value))
        score, index = score.gather(2, kept), kept
    positions.fill_(-1)
    for target, source in ((keys, key), (values, value), (scores, score), (positions, index)):
        target[:, :, : min(number, slots)] = source
    seen.fill_(number)


def fills_by_kernels(
    keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, key: Tensor, value: Tensor, score: Tensor
) -> bool:
    """Tell whether the kernels fill slots with these tokens, see `fill_slots`; `keys` may be those of `ragged` too."""
    same = key.dtype == value.dtype == keys.dtype == values.dtype and values.shape == keys.shape
    fits = same and score.dtype == torch.float32 and key.shape[2] > 0 and not torch.compiler.is_compiling()
    return fits and has_kernels(keys, values, scores, positions)


def attend_slots(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, *, scaling: float) -> Tensor:
    """Attend with one query per row and head to all slots that are filled.

    Args:
        query: `[B, Hq, 1, D]`, `Hq` a multiple of `Hkv`.
        keys, values: `[B, Hkv, S, D]`.
        positions: `[B, Hkv, S]` int64, -1 for an empty slot, of which every head of a row has the same; `None` if no
            slot is empty.
        scaling: multiplies the logits.

    Returns:
        `[B, Hq, 1, D]` in the dtype of `query`.
    """
    trains = torch.is_grad_enabled() and query.requires_grad
    if torch.compiler.is_compiling() and not trains:
        return _attend_operator(query, keys, values, positions, scaling)
    return _attend(query, keys, values, positions, scaling, trains)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, scaling: float, trains: bool
) -> Tensor:
    """Attend as `attend_slots`, in kernels or in plain PyTorch."""
    if not trains and positions is not None and has_kernels(keys, values, positions) and query.dtype == keys.dtype:
        from hf_sparse.ops.selection.triton import slots

        return slots.attend_slots(query, keys, values, positions, scaling=scaling)
    filled = None if positions is None else positions[:, :1, None] >= 0  # [B, 1, 1, S]
    group = query.reshape(len(query), keys.shape[1], -1, query.shape[-1])  # the queries of a KV head share its keys
    return F.scaled_dot_product_attention(group, keys, values, filled, scale=scaling).flatten(1, 2).unsqueeze(2)


@torch.library.custom_op("hf_sparse::attend_slots", mutates_args=())
def _attend_operator(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, scaling: float) -> Tensor:
    """Attend as `attend_slots` without a gradient; the result is contiguous."""
    return _attend(query, keys, values, positions, scaling, trains=False).contiguous()


@_attend_operator.register_fake
def _(query: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.shape)


def has_kernels(keys: Tensor, *tables: Tensor) -> bool:
    """Tell whether the kernels take slots `[B, Hkv, S, D]` and their tables: device, dtype, sizes and layout."""
    # A compiled step could not change the current device.
    taken = is_on_gpu(keys) and keys.dtype in DTYPES and keys.shape[-1] <= 256 and keys.shape[0] <= MOST_ROWS
    return _TRITON and taken and all(tensor.is_contiguous() for tensor in (keys, *tables))
