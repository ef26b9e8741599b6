"""Say what the cache layer of a method owes to the patch, beside what transformers asks of every cache layer."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_sparse.core.backbone_call import BackboneCall


@dataclass
class ModelCall:
    """Hold what the new cache layers of one call of a model share until the attention of each has filled it.

    Python runs faster over all layers at once than where each is reached. So the patch makes all cache layers at
    the first one, with the checks that one call of the model needs once, and a method can do likewise; of long texts it
    makes the others at the second one, while the GPU works on the first. There is none in a call that is being
    compiled, or recorded as a decoding step.

    Attributes:
        kinds: what the layers may differ in, as the method says it of each, in their order.
        shared: what the method lets its layers share while they read, of a class of the method; `None` before that.
        end: `[1]` int64 on the device, in a prompt that is recorded: the tokens of the text, of which more are read;
            the layers shall keep what a text of so many tokens keeps. `None` for as many as are read.
        forward: the forward of the backbone that fills the layers; `None` if that is not known. After an error another
            one may come with the same cache, and has to check it anew.
    """

    kinds: list[Any] = field(default_factory=list)
    shared: Any = None
    end: Tensor | None = None
    forward: BackboneCall | None = None


class SparseCacheLayer(Protocol):
    """Describe a `CacheLayerMixin` of transformers that the sparse attention of one module fills.

    transformers calls `update` with the keys and values of new tokens, and then the attention function. Around both the
    patch calls `begin_attention` and `end_attention`, so that `update` can tell sparse attention from dense. If an
    error ends the attention, it calls `cancel_attention` in place of `end_attention`.

    Attributes:
        call: the call of the model that has made the layer, until its attention is done; otherwise `None`.
        is_initialized: whether it has memory, as transformers has it.
    """

    call: ModelCall | None
    is_initialized: bool

    def get_seq_length(self) -> int:
        """Count the tokens so far, padding included."""

    def begin_attention(self) -> None:
        """Note that sparse attention follows the next `update`."""

    def check_mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Check a padding mask against what the cache holds, after `update`.

        Args:
            attention_mask: `[B, columns]` bool, False for padding; `None` if every token is real.
            length: tokens that are new in this forward.

        Returns:
            `[B, Tk]` bool with a column for each key that `update` returned, or `None`.

        Raises:
            ValueError: the mask lacks columns, or it contradicts an earlier one that the cache acted on.
        """

    def end_attention(self) -> None:
        """Note that the attention is done."""

    def cancel_attention(self, length: int) -> None:
        """Forget the newest `length` tokens, which `update` took in: an error ended their attention, as a refusal does.

        A step that is being recorded is not forgotten: `note_tokens` follows it, whatever became of it.
        """

    def refusal_of_static(self) -> str | None:
        """Say why this layer cannot stand in a `StaticCache`, which compiles; `None` if it can."""

    def share_mask_sizes(self) -> None:
        """Note that layers with dense attention may take the size of their mask from this layer."""


class RecordableCacheLayer(SparseCacheLayer, Protocol):
    """Describe a cache layer that `patches.recorded_steps` and `patches.recorded_prompts` can record.

    In a recorded prompt it heeds `ModelCall.end`. One that grows (`is_compileable` is false) has a method
    `write_at(place)` too: until it is called with `None`, `update` gets the key and value of one token for this place,
    `[1]` int64 on the device, and returns all that it has room for.

    Attributes:
        keys, values: `[B, Hkv, S, D]`, or of slots of unequal heads `[B, R, D]`; `None` before the first token.
    """

    keys: Any
    values: Any

    def step_memory(self) -> Tensor | None:
        """Return the tensor that the next step writes its key to, or `None` if it has to allocate one."""

    def note_tokens(self, tokens: int) -> None:
        """Take the number of tokens so far, after a step that the host has not followed, or has followed and not taken.

        Args:
            tokens: of each text, padding included.
        """

    @staticmethod
    def copy_texts(sources: Any, targets: Any, tokens: int, room: int | None = None) -> None:
        """Copy what all layers of a cache hold to those of another one, in few launches.

        Args:
            sources: layers of this class.
            targets: as many; they get new memory if they have none.
            tokens: the first ones, which layers that grow copy; others keep no more than they ever do.
            room: tokens that new memory of layers that grow has room for; `None` for as many as decoding begins with.
        """


def mask_of_keys(attention_mask: Tensor | None, keys: int) -> Tensor | None:
    """Return a padding mask `[B, Tk]` that has a column for each key.

    Raises:
        ValueError: it has another number of columns.
    """
    if attention_mask is not None and attention_mask.shape[1] != keys:
        raise ValueError(
            f"the attention mask must have a column for each of {keys} tokens, got {attention_mask.shape[1]}"
        )
    return attention_mask


def is_recorded(device: torch.device) -> bool:
    """Tell whether what runs now is compiled, or recorded as a CUDA graph, to be repeated without its Python code."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


class GrowingCacheLayer(DynamicLayer):
    """Keep all keys and values, as the ordinary cache layer does: what most methods need, or begin with."""

    call: ModelCall | None = None

    def begin_attention(self) -> None:
        """Do nothing: dense attention would find all keys too."""

    def check_mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Return the padding mask of all keys, see `SparseCacheLayer`."""
        return mask_of_keys(attention_mask, self.get_seq_length())

    def end_attention(self) -> None:
        """Do nothing: there is nothing to finish."""

    def cancel_attention(self, length: int) -> None:
        """Forget the newest `length` tokens; the first ones go with their shapes, for others may come next."""
        if self.get_seq_length() > length:
            self.crop(-length)
        else:
            self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.keys = self.values = None  # older transformers keep zeros
        self.is_initialized = False

    def refusal_of_static(self) -> str | None:
        """Say that a static cache does not grow."""
        return "the method keeps every key in a cache that grows, which a static cache does not"

    def share_mask_sizes(self) -> None:
        """Change nothing: the mask has a column for every key."""
