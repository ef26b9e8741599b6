"""Hold the tensors of KV slots: allocate them, move rows and devices, and copy them.

Compiled steps and recorded ones keep the addresses of these tensors, so that what changes is written in place wherever
shape and device stay. The cache layer of SparseK is made of three classes, each of which inherits from the one before:
`SlotMemory` has the tensors, `KeySlots` puts keys into them and attends, and `SparseKCacheLayer` counts tokens and
answers to transformers and to the patch.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_sparse.core.cache import ModelCall
from hf_sparse.methods.sparsek.fixed_memory import SharedSlots, alike, fix_address, lasting

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.ahead import Ahead
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.methods.sparsek.known_layer import Scoring
    from hf_sparse.methods.sparsek.step import StepPlan

_STATE = ("keys", "values", "scores", "positions", "seen", "padded_late", "memory")
_OF_TEXT = ("keys", "values", "_scores", "positions", "seen", "padded_late", "cumulative_length")  # what `take` takes


class SlotTensor:
    """Look for a tensor of a layer that has none of its own: in memory that it shares, or there is none yet."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None or layer.shared is None:
            return None
        layer.find_tensors()
        return vars(layer)[self.name]


class SlotMemory(CacheLayerMixin):
    """Hold the tensors of a layer's KV slots, and what has to follow when they change.

    Attributes (the tensors are `None` before the first token):
        keys, values: `[B, Hkv, S, D]` with `S = sinks + window + k`.
        scores: `[B, Hkv, S]` float32. To read them ends what was foreseen of the next steps.
        positions: `[B, Hkv, S]` int64, index of the token in its row, -1 for an empty slot.
        seen: `[B]` int64, real tokens so far.
        padded_late: `[B]` bool, rows with padding after a real token.
        memory: `[B, Hkv, D]`, what a baseline remembers of all tokens so far; `None` for the others.
        cumulative_length: int64 without dimensions, tokens so far with padding.
        counts, offsets: slots of each KV head where they differ, and where these begin, see `RaggedCacheLayer`; `None`
            where they do not.
        shared: the memory that has the tensors of the layer, and its number there, until one of them is read; or
            `None`.
        empty: whether nothing was written yet.
        soft: whether soft gates, which are for learning, were between the tokens so far.
        counts_arrivals: whether a step of the layer is compiled, so that it keeps `arrived`.
        arrived: int32 `[B * Hkv + 1]`, counters of the kernel of a compiled step, zero between two steps; or `None`.
        step: the plan of a decoding step in one kernel, see `methods.sparsek.step`; `None` before the first such step.
        ahead: what is foreseen of the next steps on the CPU, see `methods.sparsek.ahead`, or `None`.
        call: the call of the model that made the layer and goes on, see `SparseCacheLayer`; then `scoring` is known.
        number_in_call: of the layer among those that this call made.
        scoring: what a scorer of linear scores computes with, see `methods.sparsek.known_layer`; or `None`.
    """

    is_initialized = False
    # What every new layer begins with stands here, for a prefill makes one per layer of the model.
    keys: Any = SlotTensor()
    values: Any = SlotTensor()
    positions: Any = SlotTensor()
    seen: Any = SlotTensor()
    padded_late: Any = SlotTensor()
    cumulative_length: Any = SlotTensor()
    memory: Any = None
    shared: tuple[SharedSlots, int] | None = None
    arrived: Any = None
    counts: tuple[int, ...] | None = None
    offsets: Tensor | None = None
    empty = True
    soft = False
    call: ModelCall | None = None
    number_in_call = 0
    scoring: "Scoring | None" = None
    step: "StepPlan | None" = None
    ahead: "Ahead | None" = None
    counts_arrivals = False
    k: int
    window: int
    sinks: int
    owner: object
    _scores: Any = SlotTensor()
    _length: int | None = 0  # cumulative_length, where no compiled or recorded step can have changed it

    @property
    def slots(self) -> int:
        """Return the number of slots of a KV head; of the head that has the fewest where they differ."""
        return self.sinks + self.window + self.k

    def _shape(self, heads: int) -> tuple[int, ...]:
        """Return the shape of the slots of one row."""
        return heads, self.slots

    @property
    def scores(self) -> Any:
        if self.ahead is not None:
            ahead, self.ahead = self.ahead, None
            ahead.write_scores(self._scores)
        return self._scores

    @scores.setter
    def scores(self, scores: Tensor) -> None:
        self.ahead, self._scores = None, scores

    @property
    def nbytes(self) -> int:
        """Count the bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        shape = (batch, *self._shape(heads))
        with lasting():
            self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
            self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
            self.scores = torch.zeros(shape, dtype=torch.float32, device=self.device)
            self.positions = torch.full(shape, -1, device=self.device)
            self.seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self.padded_late = torch.zeros(batch, dtype=torch.bool, device=self.device)
            self.memory = None
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        self._length = 0
        for tensor in self._state():
            fix_address(tensor)
        self._make_counters()
        self.is_initialized = True

    def begin_text(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots, still empty, for the tokens that `update` has counted."""
        length = self._length
        self.lazy_initialization(key_states, value_states)
        self.cumulative_length.fill_(length)
        self._length = length

    def take(
        self,
        keys: Tensor,
        values: Tensor,
        scores: Tensor,
        positions: Tensor,
        seen: Tensor,
        padded_late: Tensor,
        cumulative_length: Tensor,
    ) -> None:
        """Take slots that were made with their content, for the tokens that `update` has counted.

        They have been marked as `fix_address` does.
        """
        self.keys, self.values, self._scores, self.positions = keys, values, scores, positions
        self.seen, self.padded_late, self.cumulative_length = seen, padded_late, cumulative_length
        self._begin_with(keys.dtype, keys.device)

    def take_shared(self, slots: SharedSlots, number: int) -> None:
        """Take slots as `take`, those of a layer in memory that several share; this layer has none yet."""
        self.shared = slots, number
        self._begin_with(slots.dtype, slots.device)

    @torch.compiler.assume_constant_result
    def find_tensors(self) -> bool:
        """Find the tensors of this layer in the memory that it shares.

        What is compiled calls this before it reads one: it is run where that is traced, and no part of it.
        """
        if self.shared is not None:
            slots, number = self.shared
            vars(self).update(zip(_OF_TEXT, slots.tensors(number), strict=True))
            self.shared = None
        return True

    def _begin_with(self, dtype: torch.dtype, device: torch.device) -> None:
        """Note that there are slots with content."""
        self.dtype, self.device = dtype, device
        if self.counts_arrivals:
            self._make_counters()
        self.is_initialized, self.empty, self.soft = True, False, False

    @staticmethod
    def copy_texts(
        sources: Sequence["SlotMemory"], targets: Sequence["SlotMemory"], tokens: int, room: int | None = None
    ) -> None:
        """Copy the slots of all layers of a cache to those of another one, see `RecordableCacheLayer`.

        Args:
            sources: layers that hold texts without a baseline's memory.
            targets: as many, of the same budgets; none of them has slots yet, or all have slots of these shapes.
            tokens, room: for layers that grow; slots are as many as ever.
        """
        kinds = [[getattr(layer, name) for layer in sources] for name in _OF_TEXT]
        are_new = not targets[0].is_initialized
        if are_new:
            copies = [alike(kind) for kind in kinds]
        else:
            copies = [[getattr(layer, name) for layer in targets] for name in _OF_TEXT]
        with torch.no_grad():
            for copy_of, kind in zip(copies, kinds, strict=True):
                torch._foreach_copy_(copy_of, kind)
        if are_new:
            for layer, tensors in zip(targets, zip(*copies, strict=True), strict=True):
                layer.take(*tensors)

    def _make_counters(self) -> None:
        """Allocate the counters of the kernel of a compiled step, for as many rows as the slots have; or none."""
        if not self.counts_arrivals:
            return
        with lasting():
            self.arrived = self.seen.new_zeros(self._pairs() + 1, dtype=torch.int32)
        fix_address(self.arrived)

    def _pairs(self) -> int:
        """Return the number of rows times that of KV heads."""
        return self.keys.shape[0] * (self.keys.shape[1] if self.counts is None else len(self.counts))

    def _state(self) -> list[Tensor]:
        return [t for t in (*(getattr(self, name) for name in _STATE), self.cumulative_length) if t is not None]

    def prefetch(self) -> None:
        """Move the slots back."""
        if self.is_initialized and self.keys.device != self.device:
            self._each(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices.to(t.device)])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has; the kernel of a step writes to the memory of this layer, and a copy needs its own.

        A prefill allocates the slots of all layers together, and each tensor would be copied with all of them. The
        parameters of the scorer, which are known during that call, are no part of a cache.
        """
        _ = self.scores  # all of them, before they are copied
        state = {**self.__dict__, "step": None, "call": None, "scoring": None}
        for name, value in state.items():
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                with lasting():
                    state[name] = value.clone()
                fix_address(state[name])
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with lasting():
            copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def lent_to(self, attention: "SparseKAttention") -> Self:
        """Return slots in the same memory for a compiled step in which another attention stands for that of this layer.

        What the step notes on the host is to be noted here by `note_tokens`.
        """
        _ = self.scores  # all of them
        if self.arrived is None:  # the kernel would make counters in every step
            self.counts_arrivals = True
            self._make_counters()
        lent = type(self).__new__(type(self))
        lent.__dict__.update(self.__dict__, step=None)
        for name, value in vars(lent).items():
            if isinstance(value, Tensor):
                setattr(lent, name, value.detach())  # one that is marked by `fix_address` would be compiled for itself
        for tensor in (lent.keys, lent.values, lent.scores, lent.positions):
            torch._dynamo.maybe_mark_dynamic(tensor, lent.scores.ndim - 1)  # layers may have other numbers of slots
        lent.owner, lent.scoring, lent._length = attention.owner, None, None
        return lent

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the state by what `change` makes of it.

        Where shape and device stay, the result is written into the old tensor: compiled steps keep its address.
        """
        if not self.is_initialized:
            return
        for name in _STATE:
            old = getattr(self, name)
            if old is None:
                continue
            with lasting():
                new = change(old)
            if new.shape == old.shape and new.device == old.device:
                old.copy_(new)
            else:
                setattr(self, name, new)
                fix_address(new)
                self.step = None  # it holds the old memory
        counters = self.arrived
        if counters is not None and (counters.device, len(counters)) != (self.keys.device, self._pairs() + 1):
            self._make_counters()

    def remember(self, memory: Tensor) -> None:
        """Keep `[B, Hkv, D]` for the next tokens, at an address that stays."""
        if self.memory is None:
            with lasting():
                self.memory = memory.clone()
            fix_address(self.memory)
        else:
            self.memory.copy_(memory)
