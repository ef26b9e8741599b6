"""Find on the CPU which slots the next tokens of a text will take, long before they come.

Scores are frozen, so which keys leave in the next steps depends on those that are there: a token that is new within a
window of steps is itself in the window until after them. For every row and head a queue of the keys outside the window
gives the weakest again and again, and takes in those that the window leaves behind.
"""

import heapq

import numpy as np
import torch
from torch import Tensor


def next_slots(scores: Tensor, positions: Tensor, seen: Tensor, count: int, *, window: int, sinks: int) -> Tensor:
    """Return the slots that `insert_token` would give to the next `count` tokens of each row, one after another.

    Args:
        scores: `[B, Hkv, S]` float32, on the CPU.
        positions: `[B, Hkv, S]` int64, -1 for an empty slot.
        seen: `[B]` int64, tokens of each row so far.
        count: 1 to `window`.
        window, sinks: see `insert_token`.

    Returns:
        `[B, Hkv, count]` int64; no slot comes twice in a row.
    """
    table, rank = positions.numpy(), scores.numpy()
    slots = np.empty((*table.shape[:2], count), dtype=np.int64)
    for row, tokens in enumerate(seen.tolist()):
        for head in range(table.shape[1]):
            slots[row, head] = _slots_of_head(rank[row, head], table[row, head], tokens - window, count, sinks)
    return torch.from_numpy(slots)


def _slots_of_head(scores: np.ndarray, positions: np.ndarray, last: int, count: int, sinks: int) -> list[int]:
    """Return the slots of the next tokens of one row and head, whose window now begins after the position `last`."""

    def entries(chosen: np.ndarray) -> list[tuple[float, int, int]]:  # of equal scores the later key is the weaker
        slots = np.flatnonzero(chosen)
        return list(zip(scores[slots].tolist(), (-positions[slots]).tolist(), slots.tolist(), strict=True))

    queue = entries((positions >= sinks) & (positions <= last))
    heapq.heapify(queue)
    leaving = {-entry[1]: entry for entry in entries((positions > last) & (positions < last + count))}
    empty = np.flatnonzero(positions < 0).tolist()
    taken = []
    for step in range(count):
        if step and last + step >= sinks and last + step in leaving:
            heapq.heappush(queue, leaving[last + step])
        taken.append(empty[step] if step < len(empty) else heapq.heappop(queue)[2])
    return taken
