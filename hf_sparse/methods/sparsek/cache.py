"""Keep a fixed set of KV slots as a cache layer of transformers: sinks, selected keys and window, which never grow.

A key that was evicted does not come back: an operation that would need one raises. Rows of different lengths share one
buffer.

All that changes from one token to the next is in tensors that are allocated once and written in place: a decoding step
compiles, is never compiled twice, and waits for no value from the device.
"""

from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.cache import is_recorded, mask_of_keys
from hf_sparse.methods.sparsek.key_slots import KeySlots


class SparseKCacheLayer(KeySlots):
    """Hold the KV slots of one layer, as the transformers cache layer that stands for it in a `Cache`.

    transformers calls `update` before the attention function; it only counts, because which keys to keep depends on
    scores that `SparseKAttention` computes, which then calls methods of `KeySlots`.

    Attributes:
        k, window, sinks: the budget; the slots of a KV head are their sum.
        owner: whose scores these are; scores of two scorers do not compare.
        depends_on_text: whether scores depend on other tokens of the text, which `crop` could not undo.
        all_sparse: whether every attention layer of the model without a window of its own is sparse.
        shares_mask_sizes: whether layers with dense attention may take the size of their mask from this one.
        pins_prompt: whether all tokens of the first input are kept.
        may_look_ahead: whether the layer lasts long enough for steps to be foreseen.
        in_attention: whether the patch announced sparse attention that is not done yet.
        uncounted: tokens of the step in progress that `cumulative_length` does not have yet.
        is_count_read: whether the step that is being compiled reads `cumulative_length`.
    """

    is_sliding = False
    is_compileable = True
    pins_prompt = False
    may_look_ahead = True
    in_attention = False
    _offload_wanted = False
    is_count_read = False

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

    # What transformers calls.

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

        Within a step that is compiled or recorded it is a tensor without dimensions, as that of a `StaticLayer`: a
        number would be the same in every step. After such a step, reading the number waits for the device.
        """
        if not self.is_initialized:
            return self._length or 0
        if is_recorded(self.device):
            self.is_count_read = torch.compiler.is_compiling()
            self.find_tensors()
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

    def offload(self) -> None:
        """Move the slots to the CPU; right after `update`, before the attention, `end_attention` does it."""
        self._offload_wanted = self.in_attention
        if not self.in_attention:
            self._each(lambda t: t.to("cpu", non_blocking=True))

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Tell whether `crop` can remove tokens now: asked once by assisted decoding, after the prompt."""
        return not self.is_initialized or self._why_not_croppable() is None

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
        if self.is_initialized and torch.compiler.is_compiling():
            self.find_tensors()

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
