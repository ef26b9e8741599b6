"""Allocate tensors in which texts grow, and copy texts there.

A room is a tensor with places for more tokens than there are. Those that there are stand first: keys, values or codes
are a view of these, and a new token is written behind them without a copy of the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse.ops.stacked import stack_of, stacked

ROOM = 256  # tokens, at least, that are made room for when a text grows
_SHARE = 8  # or an eighth of its length: a longer text grows in larger pieces


def rooms_like(parts: Sequence[Tensor], room: int, apiece: int) -> list[Tensor]:
    """Allocate `[B, H, room, X]` for each of the tensors `[B, H, T, X]`, so many in one piece of memory if they can."""
    rooms: list[Tensor] = []
    with torch.inference_mode(False):  # tensors of that mode could not be written to after it
        for begin in range(0, len(parts), apiece):
            kinds = [
                ((*part.shape[:2], room, part.shape[3]), part.dtype, part.device)
                for part in parts[begin : begin + apiece]
            ]
            if kinds.count(kinds[0]) == len(kinds):
                rooms += stacked(len(kinds), *kinds[0])
            else:
                rooms += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]
    return rooms


def copy_tokens(parts: Sequence[Tensor], rooms: Sequence[Tensor], tokens: int, clears: bool) -> None:
    """Copy the first tokens of `[B, H, T, X]` to rooms, in one launch if both follow each other in memory.

    Args:
        parts, rooms: as many of each.
        tokens: how many, `T` at most.
        clears: whether to write zeros behind them.
    """
    source, target = stack_of(parts), stack_of(rooms)
    pairs = list(zip(parts, rooms, strict=True)) if source is None or target is None else [(source, target)]
    for part, room in pairs:
        room.narrow(-2, 0, tokens).copy_(part.narrow(-2, 0, tokens))
        if clears:
            room.narrow(-2, tokens, room.shape[-2] - tokens).zero_()


def with_room(tokens: int) -> int:
    """Return for how many tokens to make room when a text of so many begins to grow."""
    return tokens + max(ROOM, tokens // _SHARE)


def lies_in(tensor: Tensor, room: Tensor) -> bool:
    """Tell whether `[B, H, T, X]` are the first tokens of a room."""
    return (
        tensor.data_ptr() == room.data_ptr() and tensor.stride() == room.stride() and tensor.shape[0] == room.shape[0]
    )


def room_behind(tensor: Tensor, tokens: int) -> Tensor:
    """Copy `[B, H, T, X]` to a tensor that has room for so many tokens, zeros: a recorded step may read them."""
    batch, heads, length, dim = tensor.shape
    with torch.inference_mode(False):  # tensors of that mode could not be written to after it
        room = torch.empty((batch, heads, tokens, dim), dtype=tensor.dtype, device=tensor.device)
    room[:, :, :length], room[:, :, length:] = tensor, 0
    return room


def extended(codes: Tensor | None, room: Tensor | None, new: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Put codes `[B, H, n, c]` behind those that are there.

    Args:
        codes: `[B, H, T, c]`; the first ones of `room` unless rows or devices have changed.
        room: what `codes` lie in, where there may be room for more.
        new: those to append.
        tokens: that there must be room for, at least as many as there are then.

    Returns:
        All codes, `[B, H, T + n, c]`, and the tensor that they lie in.
    """
    before = 0 if codes is None else codes.shape[2]
    length = before + new.shape[2]
    places = {(part.device, part.data_ptr()) for part in (codes, room) if part is not None}
    if room is None or len(places) > 1 or room.device != new.device or room.shape[2] < tokens:
        shape = (*new.shape[:2], with_room(tokens) if before else tokens, new.shape[3])
        with torch.inference_mode(False):  # tensors of that mode could not be written to after it
            room = torch.empty(shape, dtype=new.dtype, device=new.device)
        if codes is not None:
            room[:, :, :before] = codes  # offloaded ones have not come back where only keys are waited for
        room[:, :, length:] = 0
    room[:, :, before:length] = new
    return room[:, :, :length], room
