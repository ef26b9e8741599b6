"""Allocate room for the keys and values of all layers of a cache, and copy texts there, in few launches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse.ops.stacked import stack_of, stacked


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
