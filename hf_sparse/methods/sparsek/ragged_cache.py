"""Keep different numbers of KV slots for the heads of a layer, in one buffer without gaps."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.fixed_memory import fix_address
from hf_sparse.methods.sparsek.slot_memory import SlotTensor
from hf_sparse.ops.selection import ragged
from hf_sparse.ops.selection.next_slots import next_slots


class RaggedCacheLayer(SparseKCacheLayer):
    """Hold the KV slots of a layer whose heads select different numbers of keys: exactly the budget, no padding.

    The slots of all heads stand one after another, `R` of them in a row: keys and values are `[B, R, D]`, scores and
    positions `[B, R]`. Everything else is as in `SparseKCacheLayer`.

    Attributes:
        k: selected keys of each KV head.
        counts: slots of each KV head.
        offsets: `[Hkv + 1]` int32, where the slots of each head begin and the last ones end; `None` until the first
            token.
    """

    offsets: Any = SlotTensor()
    k: tuple[int, ...]  # type: ignore[assignment]
    counts: tuple[int, ...]

    def __init__(
        self,
        k: tuple[int, ...],
        window: int,
        sinks: int,
        owner: object = None,
        all_sparse: bool = True,
        depends_on_text: bool = False,
    ) -> None:
        super().__init__(k, window, sinks, owner, all_sparse, depends_on_text)  # type: ignore[arg-type]
        self.counts = tuple([sinks + window + count for count in k])

    @property
    def slots(self) -> int:
        return min(self.counts)

    def _shape(self, heads: int) -> tuple[int, ...]:
        if heads != len(self.counts):
            raise ValueError(f"the cache has slots for {len(self.counts)} KV heads, and {heads} heads came")
        return (sum(self.counts),)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._make_offsets()

    def take(self, *tensors: Tensor) -> None:
        super().take(*tensors)
        self._make_offsets()

    @torch.compiler.assume_constant_result
    def find_tensors(self) -> bool:
        if self.shared is not None:
            super().find_tensors()
            self.offsets = ragged.known_offsets(self.counts, self.device)
            torch._dynamo.mark_static_address(self.offsets)  # also while what reads them is traced
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy all but the offsets, whose address tells the numbers of slots, see `ragged.counts_of`."""
        copied = super().__deepcopy__(memo)
        if copied.offsets is not None:
            copied._make_offsets()
        return copied

    def _make_offsets(self) -> None:
        self.offsets = ragged.offsets_of(self.counts, self.device)
        fix_address(self.offsets)

    def heads(self) -> Iterator[SparseKCacheLayer]:
        """Yield a layer for each KV head, which holds its slots alone in the memory of this one.

        What is filled into them goes on from the same state. After the last one this layer counts their tokens.
        """
        before = self.seen.clone(), self.padded_late.clone(), self.empty
        names = ("keys", "values", "scores", "positions")
        buffers = (ragged.of_heads(getattr(self, name), self.counts) for name in names)
        for k, tensors in zip(self.k, zip(*buffers, strict=True), strict=True):
            head = SparseKCacheLayer(k, self.window, self.sinks, self.owner, self.all_sparse, self.depends_on_text)
            head.dtype, head.device = self.dtype, self.device
            for name, tensor in zip(names, tensors, strict=True):
                setattr(head, name, tensor)
            head.seen, head.padded_late, head.empty = before[0].clone(), before[1].clone(), before[2]
            head.cumulative_length = self.cumulative_length
            head.is_initialized = True
            yield head
        self.seen.copy_(head.seen)
        self.padded_late.copy_(head.padded_late)
        self.empty = head.empty

    def _fill_whole(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        slots = (self.keys, self.values, self.scores, self.positions, self.seen)
        options = {"counts": self.counts, "offsets": self.offsets, "window": self.window, "sinks": self.sinks}
        ragged.fill_slots(*slots, keys, values, scores, **options)

    def _fill(self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, seen: Tensor) -> None:
        for number, head in enumerate(self.heads()):
            one = slice(number, number + 1)
            head._fill(keys[:, one], values[:, one], scores[:, one], positions[:, one], seen)

    def _insert(self, key: Tensor, value: Tensor, score: Tensor, valid: Tensor | None) -> None:
        slots = (self.keys, self.values, self.scores, self.positions)
        ragged.insert_token(
            *slots, self.seen, key, value, score, valid,
            counts=self.counts, offsets=self.offsets, window=self.window, sinks=self.sinks,
        )  # fmt: skip

    def attend(self, query: Tensor, *, scaling: float, is_full: bool = False) -> Tensor:
        slots = (self.keys, self.values, None if is_full else self.positions)
        layout = {"counts": self.counts, "offsets": self.offsets}
        return ragged.attend_slots(query, *slots, **layout, scaling=scaling)

    def next_slots(self, count: int) -> Tensor:
        tables = (ragged.of_heads(tensor, self.counts) for tensor in (self.scores, self.positions))
        heads = [
            next_slots(scores, positions, self.seen, count, window=self.window, sinks=self.sinks)
            for scores, positions in zip(*tables, strict=True)
        ]
        return torch.cat(heads, 1) + torch.tensor([0, *accumulate(self.counts[:-1])])[:, None]

    def by_head(self, slots: Tensor) -> tuple[Tensor, ...]:
        return slots.split(self.counts, 1)

    def ordered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError("the heads have different numbers of slots: ask each of `heads` for its order")
