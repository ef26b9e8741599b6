"""Keep a fixed set of KV slots: sinks, selected keys and window in one buffer that never grows.

A slot remembers the score and the position of its key. What the key is follows from the position (sink, window or
selected), so slots need no order, and rows of different lengths share one buffer. A key that is evicted can never be
selected again (scores are frozen), so nothing that the model could still want is lost; an operation that would need
an evicted key raises.

All that changes from one token to the next is in tensors that are allocated once and written in place: a decoding step
compiles, is never compiled twice, and waits for no value from the device.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_sparse.core.cache import ModelCall, is_recorded, mask_of_keys
from hf_sparse.ops.selection.next_slots import next_slots
from hf_sparse.ops.selection.slots import attend_slots, fill_slots, insert_token

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.ahead import Ahead
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.methods.sparsek.reading import Scoring
    from hf_sparse.methods.sparsek.step import StepPlan

_STATE = ("keys", "values", "scores", "positions", "seen", "padded_late", "memory")


class SparseKCacheLayer(CacheLayerMixin):
    """Hold the KV slots of one layer, as the transformers cache layer that stands for it in a `Cache`.

    transformers calls `update` before the attention function; it only counts, because which keys to keep depends on
    scores that `SparseKAttention` computes. That calls `fill` or `insert` with everything.

    Attributes:
        keys, values: `[B, Hkv, S, D]` with `S = sinks + window + k`.
        scores: `[B, Hkv, S]` float32. To read them ends what was foreseen of the next steps.
        positions: `[B, Hkv, S]` int64, index of the token in its row, -1 for an empty slot.
        seen: `[B]` int64, real tokens so far.
        padded_late: `[B]` bool, rows with padding after a real token.
        memory: `[B, Hkv, D]`, what a baseline remembers of all tokens so far; `None` for the others.
        cumulative_length: int64 without dimensions, tokens so far with padding.
        counts_arrivals: whether the layer is to be compiled, so that it keeps `arrived`.
        arrived: int32 `[B * Hkv + 1]`, counters of the kernel of a compiled step, zero between two steps; or `None`.
        empty: whether nothing was written yet.
        soft: whether soft gates, which are for learning, were between the tokens so far.
        owner: whose scores these are; scores of two scorers do not compare.
        depends_on_text: whether scores depend on other tokens of the text, which `crop` could not undo.
        all_sparse: whether every attention layer of the model without a window of its own is sparse.
        shares_mask_sizes: whether layers with dense attention may take the size of their mask from this one.
        in_attention: whether the patch announced sparse attention that is not done yet.
        step: the plan of a decoding step in one kernel, see `methods.sparsek.step`; `None` before the first such step.
        ahead: what is foreseen of the next steps on the CPU, see `methods.sparsek.ahead`, or `None`.
        counts: slots of each KV head where they differ, see `RaggedCacheLayer`; `None` here.
        offsets: where these begin; `None` here.
        may_look_ahead: whether the layer lasts long enough for steps to be foreseen.
        uncounted: tokens of the step in progress that `cumulative_length` does not have yet.
        is_count_read: whether the step that is being compiled reads `cumulative_length`.
        call: the call of the model that made the layer and goes on, see `SparseCacheLayer`; then `scoring` is known.
        scoring: what a scorer of linear scores computes with, see `methods.sparsek.reading`; or `None`.
    """

    is_sliding = False
    is_compileable = True
    is_initialized = False
    # Tensors; all are None until the first token, and memory until something is remembered. What every new layer
    # begins with stands here, for a prefill makes one per layer of the model.
    keys: Any = None
    values: Any = None
    positions: Any = None
    seen: Any = None
    padded_late: Any = None
    memory: Any = None
    cumulative_length: Any = None
    arrived: Any = None
    counts: tuple[int, ...] | None = None
    offsets: Tensor | None = None
    empty = True
    soft = False
    in_attention = False
    call: ModelCall | None = None
    scoring: "Scoring | None" = None
    step: "StepPlan | None" = None
    ahead: "Ahead | None" = None
    may_look_ahead = True
    is_count_read = False
    counts_arrivals = False
    _scores: Any = None
    _offload_wanted = False
    _length: int | None = 0  # cumulative_length, where no compiled or captured step can have changed it

    def __init__(
        self,
        k: int,
        window: int,
        sinks: int,
        owner: object = None,
        all_sparse: bool = True,
        depends_on_text: bool = False,
    ) -> None:
        self.k, self.window, self.sinks = k, window, sinks
        self.owner, self.all_sparse, self.depends_on_text = owner, all_sparse, depends_on_text
        self.shares_mask_sizes = not all_sparse
        self.uncounted = 0  # here, for a compiled step would be compiled anew once the layer has its own

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

    # What transformers calls.

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
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self._scores, self.positions = keys, values, scores, positions
        self.seen, self.padded_late, self.cumulative_length = seen, padded_late, cumulative_length
        if self.counts_arrivals:
            self._make_counters()
        self.is_initialized, self.empty, self.soft = True, False, False

    def _make_counters(self) -> None:
        """Allocate the counters of the kernel of a compiled step, for as many rows as the slots have; or none."""
        if not self.counts_arrivals:
            return
        with lasting():
            self.arrived = self.seen.new_zeros(self._pairs() + 1, dtype=torch.int32)
        fix_address(self.arrived)

    def _pairs(self) -> int:
        """Return the number of rows times that of KV heads, or more."""
        return self.keys.shape[0] * self.keys.shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.in_attention:
            raise RuntimeError(
                "this cache holds the KV slots of sparse attention, and the model continues it with dense attention: "
                "start a new cache after switching adapters on or off"
            )
        rows, length = key_states.shape[0], key_states.shape[-2]
        if not self.is_initialized and self._length:
            self.begin_text(key_states, value_states)  # the attention of the tokens before was never computed
        elif not self.is_initialized and length > 1 and (self.call or not is_recorded(key_states.device)):
            self._length = length  # the attention makes the slots, with their content or by `begin_text`
            return key_states, value_states
        if not self.is_initialized or (self.empty and self.keys.shape[0] != rows):
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[0] != rows:
            raise ValueError(f"the cache holds {self.keys.shape[0]} rows, and {rows} rows came: start a new cache")
        if length == 1:
            self.uncounted = 1  # the kernel of the step counts it; where another path is taken, `end_attention` does
        else:
            self.cumulative_length.add_(length)
        if is_recorded(self.device):
            self._length = None  # a replay adds to the tensor alone
        elif self._length is not None:
            self._length += length
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Ask for the newest columns of a padding mask, or for all where dense layers share the mask."""
        if self.shares_mask_sizes:
            return self.get_seq_length() + query_length, 0
        return query_length, 0

    def get_seq_length(self) -> int:
        """Count the tokens so far, padding included.

        Within a step that is compiled or captured it is a tensor without dimensions, as that of a `StaticLayer`: a
        number would be the same in every step. After such a step, reading the number waits for the device.
        """
        if not self.is_initialized:
            return self._length or 0
        if is_recorded(self.device):
            self.is_count_read = torch.compiler.is_compiling()
            return self.cumulative_length + self.uncounted
        return int(self.cumulative_length) if self._length is None else self._length

    def step_memory(self) -> Any:
        """Return the slots of the keys: all tensors of the slots are replaced together."""
        return self.keys

    def note_tokens(self, tokens: int) -> None:
        """Take the number of tokens so far, after a recorded step was taken or one was recorded and not taken.

        The host has not followed the one, and has counted the other.
        """
        self._length, self.uncounted, self.in_attention = tokens, 0, False

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Tell whether `crop` can remove tokens now: asked once by assisted decoding, after the prompt."""
        return not self.is_initialized or self._why_not_croppable() is None

    def _state(self) -> list[Tensor]:
        return [t for t in (*(getattr(self, name) for name in _STATE), self.cumulative_length) if t is not None]

    def reset(self) -> None:
        """Forget everything, also a call that an error ended, and keep the buffers."""
        self.ahead, self.call, self.scoring = None, None, None
        if self.is_initialized:
            for tensor in self._state():
                tensor.zero_()
            self.positions.fill_(-1)
        self.empty, self.soft, self._length = True, False, 0
        self.uncounted = 0
        self.in_attention = self.is_count_read = self._offload_wanted = False

    def offload(self) -> None:
        """Move the slots to the CPU; right after `update`, before the attention, `end_attention` does it."""
        self._offload_wanted = self.in_attention
        if not self.in_attention:
            self._each(lambda t: t.to("cpu", non_blocking=True))

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
        lent = type(self).__new__(type(self))
        lent.__dict__.update(self.__dict__, step=None)
        for name, value in vars(lent).items():
            if isinstance(value, Tensor):
                setattr(lent, name, value.detach())  # one that is marked by `fix_address` would be compiled for itself
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

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, as long as nothing has been evicted yet.

        Raises:
            ValueError: a positive count.
            RuntimeError: keys were evicted, and the kept set of a shorter text may need them back; or the scores are
                those of a baseline and depend on the tokens that would go; or padding stands after a real token, so
                that the last columns are not the last tokens.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if reason := self._why_not_croppable():
            raise RuntimeError(reason)
        _ = self.scores  # of the tokens that stay
        self.seen.add_(tokens_to_remove).clamp_(min=0)
        seen = self.seen.view(-1, *[1] * (self.positions.ndim - 1))
        self.positions.masked_fill_(self.positions >= seen, -1)
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        if self._length is not None:
            self._length = max(0, self._length + tokens_to_remove)

    def _why_not_croppable(self) -> str | None:
        if self.depends_on_text:
            return (
                "the scores in this cache depend on all tokens so far, so it cannot be cropped: generate with this "
                "baseline without an assistant"
            )
        if int(self.seen.max()) > self.slots:
            return (
                f"the SparseK cache has {self.slots} slots and has seen {int(self.seen.max())} tokens: keys were "
                "evicted for good, so it cannot be cropped (assisted decoding needs that; use a larger budget, or "
                "generate without an assistant)"
            )
        if bool(self.padded_late.any()):
            return "a row has padding after its first real token: its last columns are not its last tokens"
        return None

    # What the patch and the attention call.

    def begin_attention(self) -> None:
        """Note that sparse attention follows the next `update`: dense attention would miss the keys that left."""
        self.in_attention = True

    def check_mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Check that a padding mask calls as many earlier tokens real as came as real ones.

        A single new token is not checked: it would wait for the device.

        Args:
            attention_mask: `[B, columns]` bool; as many columns as new tokens, or more that stand for earlier ones.
            length: new tokens.

        Returns:
            `[B, length]` bool, the columns of the new tokens, or `None`.

        Raises:
            ValueError: too few columns, or other earlier tokens than those that came.
        """
        columns = length if attention_mask is None else attention_mask.shape[1]
        if self.empty or columns < length:
            return None if attention_mask is None else mask_of_keys(attention_mask, length)
        if length > 1 and not torch.compiler.is_compiling():
            if attention_mask is not None and columns > length:
                self._check_real_tokens(attention_mask[:, :-length].sum(-1))
            else:  # no mask: all is real
                self._check_real_tokens((self.cumulative_length - length).expand_as(self.seen))
        return attention_mask[:, -length:] if attention_mask is not None and columns > length else attention_mask

    def _check_real_tokens(self, real: Tensor) -> None:
        """Raise `ValueError` unless each row has had as many real tokens, `[B]`, as a padding mask says now."""
        if not torch.equal(real.to(self.seen), self.seen):
            raise ValueError(
                f"the attention mask has {real.tolist()} real tokens before the new ones, and the cache has taken in "
                f"{self.seen.tolist()} as real: sparse attention decides when a token comes, so a mask cannot be "
                "changed later. generate feeds padding as real tokens to a row that ended before the others (give such "
                "rows a cache of their own, or reset the cache and pass the whole text), and it takes every pad token "
                "in the text for padding unless attention_mask says otherwise"
            )

    def end_attention(self) -> None:
        """Count the token of a single step, and move the slots to the CPU if `offload` came before the attention."""
        self.in_attention = self.is_count_read = False
        if self.uncounted:
            self.cumulative_length.add_(self.uncounted)
            self.uncounted = 0
        if self._offload_wanted:
            self.offload()

    def cancel_attention(self, length: int) -> None:
        """Forget tokens that have been counted and have no slots yet, see `SparseCacheLayer`."""
        self.in_attention = self.is_count_read = self._offload_wanted = False
        if self.is_initialized and is_recorded(self.device):
            return
        if self.is_initialized and not self.uncounted:
            self.cumulative_length.sub_(length)
        self.uncounted = 0
        if self._length is not None:
            self._length -= length

    def refusal_of_static(self) -> str | None:
        """Say why a static cache cannot hold these slots; `None` where every full-attention layer is sparse."""
        if self.all_sparse:
            return None
        return "a static cache needs every full-attention layer patched, and the adapter names some only (`layers`)"

    def share_mask_sizes(self) -> None:
        """Ask for all columns of a padding mask from now on."""
        self.shares_mask_sizes = True

    def ordered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys, values, scores and positions in the order of positions, empty slots first."""
        positions, order = self.positions.sort(dim=-1)
        columns = order[..., None]
        return (
            self.keys.gather(2, columns.expand_as(self.keys)),
            self.values.gather(2, columns.expand_as(self.values)),
            self.scores.gather(2, order),
            positions,
        )

    def remember(self, memory: Tensor) -> None:
        """Keep `[B, Hkv, D]` for the next tokens, at an address that stays."""
        if self.memory is None:
            with lasting():
                self.memory = memory.clone()
            fix_address(self.memory)
        else:
            self.memory.copy_(memory)

    @torch.no_grad()
    def fill_whole(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Fill the slots, as `fill` does, with the first tokens of rows without padding.

        Args:
            keys, values: `[B, Hkv, N, D]`, `N` of any size.
            scores: `[B, Hkv, N]`.
        """
        if not self.is_initialized:
            self.begin_text(keys, values)
        self._fill_whole(keys, values, scores)
        self.empty = False

    def _fill_whole(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Write to the slots what `fill_whole` keeps, and count the tokens."""
        slots = (self.keys, self.values, self.scores, self.positions, self.seen)
        fill_slots(*slots, keys, values, scores, window=self.window, sinks=self.sinks)

    @torch.no_grad()
    def fill(self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, seen: Tensor) -> None:
        """Fill the slots with the sinks, the window and the best-scored other tokens that a later query can attend to.

        Args:
            keys, values: `[B, Hkv, N, D]`, `N` of any size, in the order of positions.
            scores, positions: `[B, Hkv, N]`; a position of -1 marks an entry that is not a token.
            seen: `[B]`, real tokens so far.
        """
        if not self.is_initialized:
            self.begin_text(keys, values)
        self.padded_late |= ((positions[:, 0] < 0) & (positions[:, 0].cummax(-1).values >= 0)).any(-1)
        self._fill(keys, values, scores, positions, seen)
        self.seen.copy_(seen)
        self.empty = False

    def _fill(self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, seen: Tensor) -> None:
        """Write to the slots what `fill` keeps."""
        kept = _entries_to_keep(scores, positions, seen, self.window, self.sinks, self.slots)
        count = kept.shape[-1]
        filled = positions.gather(2, kept)
        self.positions.fill_(-1)
        self.positions[:, :, :count] = filled
        self.scores[:, :, :count] = scores.gather(2, kept).float()
        columns = kept[..., None]
        for slots, source in ((self.keys, keys), (self.values, values)):
            kept_source = source.gather(2, columns.expand(-1, -1, -1, source.shape[-1]))
            slots[:, :, :count] = kept_source.masked_fill(filled[..., None] < 0, 0)  # padding may be anything

    @torch.no_grad()
    def insert(self, key: Tensor, value: Tensor, score: Tensor, valid: Tensor | None) -> None:
        """Take the next token of each row into an empty slot, or into that of the weakest key outside the window.

        Args:
            key, value: `[B, Hkv, 1, D]`.
            score: `[B, Hkv, 1]`.
            valid: `[B]` bool, rows whose token is real; `None` if all are.
        """
        if not self.is_initialized:
            self.begin_text(key, value)
        if valid is not None:
            self.padded_late.logical_or_(~valid & (self.seen > 0))
        self._insert(key, value, score, valid)
        self.seen.add_(1 if valid is None else valid.long())
        self.empty = False

    @torch.no_grad()
    def pin(self) -> None:
        """Keep what the slots hold now for good: no score is as high as theirs."""
        self.scores.masked_fill_(self.positions >= 0, torch.inf)

    def _insert(self, key: Tensor, value: Tensor, score: Tensor, valid: Tensor | None) -> None:
        """Write the next token to its slot."""
        slots = (self.keys, self.values, self.scores, self.positions)
        insert_token(*slots, self.seen, key, value, score, valid, window=self.window, sinks=self.sinks)

    def attend(self, query: Tensor, *, scaling: float, is_full: bool = False) -> Tensor:
        """Attend with the one new query of each row to all filled slots, see `ops.selection.slots.attend_slots`.

        Args:
            query: `[B, Hq, 1, D]`.
            scaling: multiplies the logits.
            is_full: no slot is empty.
        """
        positions = None if is_full else self.positions
        return attend_slots(query, self.keys, self.values, positions, scaling=scaling)

    def next_slots(self, count: int) -> Tensor:
        """Return the slots of the next `count` tokens, `[B, Hkv, count]`, as indices into all slots of a row."""
        slots = next_slots(self.scores, self.positions, self.seen, count, window=self.window, sinks=self.sinks)
        return slots + torch.arange(slots.shape[1])[:, None] * self.slots

    def by_head(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Return the part `[B, S, ...]` of each KV head of a tensor that has a place for every slot."""
        return slots.unbind(1)


def _entries_to_keep(scores: Tensor, positions: Tensor, seen: Tensor, window: int, sinks: int, slots: int) -> Tensor:
    """Return the indices `[B, Hkv, min(N, slots)]` of the entries to keep, in the order of positions."""
    always_kept = (positions >= seen[:, None, None] - window) | (positions < sinks)
    priority = scores.masked_fill(always_kept, torch.inf).masked_fill(positions < 0, -torch.inf)
    order = priority.argsort(dim=-1, descending=True, stable=True)[..., :slots]
    return order.sort(dim=-1).values


def lasting() -> AbstractContextManager[Any]:
    """Make tensors that can be written to in any mode: those of `torch.inference_mode` could not be after it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def fix_address(tensor: Tensor) -> None:
    """Tell CUDA graphs that the tensor stays where it is, so that they can write to it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
