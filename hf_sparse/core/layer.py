"""Define what every method is to the layers above: a module attached to one attention module of a model."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_sparse.core.adapter_layer import AdapterLayer, ConfigT
from hf_sparse.core.cache import GrowingCacheLayer, ModelCall, SparseCacheLayer
from hf_sparse.core.request_state import RequestAttention

_NO_CACHE = "a bidirectional attention module sees all tokens at once and has no KV cache: pass none"


@dataclass(frozen=True)
class AttentionShape:
    """Describe the attention module that a method is attached to.

    Attributes:
        hidden_size: size of its input.
        num_attention_heads: query heads, a multiple of the KV heads.
        num_key_value_heads: KV heads.
        head_dim: size of a query, key or value of one head.
        layer: its number among the attention modules of the model, 0 first.
        causal: whether queries see earlier keys only.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer: int
    causal: bool = True


class SparseAttentionLayer(AdapterLayer[ConfigT], RequestAttention):
    """Hold one sparse attention method for one attention module, whose child `sparse_attention` it is.

    Subclasses have the two containers of `AdapterLayer`. They write `for_shape`, `make_parameters` and `attend`, and
    `make_cache_layer` where the cache keeps something else than all keys; the methods of `RequestAttention` where the
    state of a request has a fixed size.

    Attributes:
        label: what messages call the method.
        shape_fields: the fields of `AttentionShape` that the shapes of its parameters depend on.
        unfitted: names of its buffers that are NaN until they are fitted.
        cache_layer_type: the class of what `make_cache_layer` returns: a `CacheLayerMixin` of transformers that is a
            `SparseCacheLayer`. By default it keeps all keys.
        static_cache_layer_type: that of what `static_cache_layer` returns, where it is another.
        layer, causal: see `AttentionShape`.
        has_local_neighbours: whether the model has other layers with a sliding window of their own; the patch sets it.
        dense_window: whoever trains the layer may set it for a forward of whole texts. Other than 0, the method and
            LoRA are left out, and attention is that of the base model within so many tokens, see
            `hf_sparse.ops.local_attention`.
    """

    label: ClassVar[str]
    shape_fields: ClassVar[tuple[str, ...]]
    unfitted: ClassVar[tuple[str, ...]] = ()
    cache_layer_type: ClassVar[type] = GrowingCacheLayer
    static_cache_layer_type: ClassVar[type | None] = None
    layer: int
    causal: bool

    @classmethod
    def for_shape(cls, shape: AttentionShape) -> Self:
        """Make the layer for one attention module, without adapters yet."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.has_local_neighbours = False
        self.dense_window = 0

    @classmethod
    def check(cls, config: ConfigT, shape: AttentionShape, num_layers: int) -> None:
        """Raise `ValueError` for a configuration that does not fit the model; called before anything changes.

        Args:
            config: of the method.
            shape: that of the first attention module.
            num_layers: attention layers of the model.
        """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor,
        valid: Tensor | None,
        cache: Any,
        scaling: float,
    ) -> Tensor:
        """Compute the attention of the new tokens.

        Args:
            query: `[B, Hq, T, D]` of the new tokens, positions applied.
            key, value: `[B, Hkv, Tk, D]`, what the cache returned; without one, or of slots, those of the new tokens.
            hidden_states: `[B, T, C]`, the input of the attention module.
            valid: `[B, Tk]` bool, False for padding; `None` if every token is real.
            cache: the layer that `cache_layer` made for this sequence, a `SparseCacheLayer`, or `None`.
            scaling: multiplies the logits.

        Returns:
            `[B, Hq, T, D]`; what stands at padding is finite and meaningless.
        """
        raise NotImplementedError

    def attend_fast(
        self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, cache: Any, call: Any, scaling: float
    ) -> Tensor | None:
        """Compute what `attend` does for whole texts by a way that takes less Python, if the method has one.

        Args:
            query, key, value, hidden_states, scaling: as in `attend`; there is no padding.
            cache: the layer that `cache_layer_in_call` made, and that holds nothing yet; or `None`.
            call: its `ModelCall`; without a cache a `BackboneCall`, in which this layer is `ready`.

        Returns:
            `[B, Hq, T, D]`; `None`, with nothing changed, where `attend` has to do it.
        """
        return None

    def prepare(self, length: int) -> Any:
        """Return what `attend_fast` needs to know of this layer in a forward that keeps no keys.

        Args:
            length: tokens of the texts, which are read without gradients and autocast.
        """
        return None

    def is_learning(self, cache: Any) -> bool:
        """Tell whether a forward is one to learn from: in `train` mode, unless it fills a cache without gradients."""
        return self.training and (cache is None or torch.is_grad_enabled())

    def low_rank(self, name: str, states: Tensor) -> Tensor | None:
        """Return what LoRA adds to the output of the linear layer `name` for its input `[..., inputs]`, or `None`."""
        if not self.is_active or self.dense_window or self.active not in self.lora:
            return None
        return self.lora[self.active](name, states)

    def recording_key(self) -> Hashable | None:
        """Return all that decides in Python what a forward without a cache computes, beside the shapes of its inputs.

        A recording of a training step repeats what the GPU did, and is taken again where this is equal.

        Returns:
            `None` if a forward must not be repeated without its Python code.
        """
        return None

    def check_cache(self, cache: Any) -> None:
        """Refuse a cache layer that this forward cannot go on with, before it counts new tokens.

        Args:
            cache: a cache layer, if all is well one that `cache_layer` made.

        Raises:
            ValueError: the attention is bidirectional, or the cache layer goes on with something else.
            TypeError: it is not of `cache_layer_type`.
        """
        if not self.causal:
            raise ValueError(_NO_CACHE)
        if not self.has_made(cache):
            expected = self.cache_layer_type.__name__
            raise TypeError(f"{self.label} needs a {expected} as its cache layer, got {type(cache).__name__}")

    def has_made(self, cache: Any) -> bool:
        """Tell whether a cache layer is of the kinds that `cache_layer` and `static_cache_layer` make."""
        static = self.static_cache_layer_type
        return isinstance(cache, self.cache_layer_type) or (static is not None and isinstance(cache, static))

    def cache_layer(self) -> SparseCacheLayer:
        """Make a new, empty cache layer for one batch of sequences.

        Raises:
            ValueError: the attention is bidirectional.
        """
        if not self.causal:
            raise ValueError(_NO_CACHE)
        return self.make_cache_layer()

    def make_cache_layer(self) -> Any:
        """Make the cache layer of this module, of `cache_layer_type`; called for causal attention alone."""
        return self.cache_layer_type()

    def cache_layer_in_call(self, call: ModelCall) -> SparseCacheLayer:
        """Make a new, empty cache layer in a call of the model that is going to fill it."""
        layer: Any = self.cache_layer()
        layer.call = call
        return layer

    def dense_cache_layer(self, layer: DynamicLayer) -> DynamicLayer:
        """Return what takes the place of the cache layer of an attention module that is not patched.

        Args:
            layer: that of transformers, which may hold the keys and values of a prompt.
        """
        return layer

    def static_cache_layer(self, tokens: int) -> SparseCacheLayer:
        """Make a new, empty cache layer to stand in a `StaticCache`, which has room for `tokens` tokens and compiles.

        By default it is the ordinary one, where that says that it can stand there.

        Raises:
            ValueError: the attention is bidirectional, or the method cannot go on in a static cache.
        """
        layer = self.cache_layer()
        if reason := layer.refusal_of_static():
            raise ValueError(f"{reason}: use the ordinary cache")
        return layer

    @property
    def steps_are_alike(self) -> bool:
        """Tell whether a decoding step, as the layer is set now, reads its tensors and its cache layer alone.

        Then a step that is compiled for one layer serves all, see `patches.compiled_layers`. The cache layer has a
        method `lent_to(attention)`: it returns one with the same memory for the attention of another layer.
        """
        return False

    @property
    def longest_prompt(self) -> int | None:
        """Return the tokens beyond which a prompt that fills a cache is refused; `None` for any number."""
        return None

    @property
    def prompt_edge(self) -> int | None:
        """Return the length in tokens at which the launches of a prompt change; longer prompts have others.

        A recorded prompt is padded, and padding must not take it past this length, see `patches.recorded_prompts`.

        Returns:
            0 if prompts of all lengths have the same launches; `None` if a recording cannot fill the cache layer (a
            `RecordableCacheLayer`), or what fills it waits for the device.
        """
        return None
