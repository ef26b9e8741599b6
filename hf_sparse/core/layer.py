"""Define what every method is to the layers above: a module attached to one attention module of a model."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar
from uuid import uuid4

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicLayer

from hf_sparse.core.cache import GrowingCacheLayer, ModelCall, SparseCacheLayer
from hf_sparse.core.config import SparseConfig
from hf_sparse.core.lora import LowRank
from hf_sparse.core.prompt_chunks import ChunkGroup
from hf_sparse.core.request_state import StateTensor

ConfigT = TypeVar("ConfigT", bound=SparseConfig)

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


class SparseAttentionLayer(nn.Module, BaseTunerLayer, Generic[ConfigT]):
    """Hold one sparse attention method for one attention module, whose child `sparse_attention` it is.

    It speaks PEFT's layer protocol (`adapter_layer_names`, `set_adapter`, `enable_adapters`, ...), so that saving,
    switching and disabling need no second implementation; it works without a `PeftModel` all the same. Subclasses
    have two containers of learned modules by adapter, named in `adapter_layer_names`: their own, and one for LoRA, for
    the adapters with a `lora_rank`. They write `for_shape`, `make_parameters` and `attend`, and `make_cache_layer`
    where the cache keeps something else than all keys.

    Attributes:
        label: what messages call the method.
        shape_fields: the fields of `AttentionShape` that the shapes of its parameters depend on.
        unfitted: names of its buffers that are NaN until they are fitted.
        cache_layer_type: the class of what `make_cache_layer` returns: a `CacheLayerMixin` of transformers that is a
            `SparseCacheLayer`. By default it keeps all keys.
        static_cache_layer_type: that of what `static_cache_layer` returns, where it is another.
        layer, causal: see `AttentionShape`.
        configs: the configuration of each adapter.
        identities: a text for each adapter that no other adapter has, for a name can be used again.
        last_for: the adapters for which no later layer is patched.

    The patch that attaches the layer sets the rest:

    Attributes:
        is_managed: tells whether transformers manages the adapters of the model (its own `add_adapter` and
            `load_adapter`).
        on_toggle: is called when the method is switched on or off.
        hooks: what to remove with the layer.
        base_device: the device of the attention module.
        linears: sizes (inputs, outputs) of the linear layers of the attention module where LoRA changes them, by name.
        has_local_neighbours: whether the model has other layers with a sliding window of their own.

    Whoever trains the layer may set, for a forward of whole texts:

    Attributes:
        dense_window: other than 0, the method and LoRA are left out, and attention is that of the base model within so
            many tokens, see `hf_sparse.ops.local_attention`.
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
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self.configs: dict[str, ConfigT] = {}
        self.identities: dict[str, str] = {}
        self.last_for: set[str] = set()
        self.is_managed: Callable[[], bool] | None = None
        self.on_toggle: Callable[[bool], None] | None = None
        self.hooks: list[RemovableHandle] = []
        self.base_device: torch.device | None = None
        self.linears: dict[str, tuple[int, int]] = {}
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

    def make_parameters(self, config: ConfigT) -> nn.Module:
        """Make new learned parameters of one adapter."""
        raise NotImplementedError

    def add_adapter(self, name: str, config: ConfigT) -> None:
        """Create the learned parameters of one adapter. The first one becomes the active one."""
        self.configs[name] = config
        self.identities[name] = uuid4().hex
        getattr(self, self.adapter_layer_names[0])[name] = self.make_parameters(config)
        if config.lora_rank:
            # With the same seed, what the method itself learns starts as it would without LoRA.
            with torch.random.fork_rng(devices=[]):
                self.lora[name] = LowRank(self.linears, config.lora_rank, config.lora_scale)
        if not self.active_adapters:
            self.set_adapter(name, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the learned parameters of one adapter and all that is known of it."""
        self.configs.pop(adapter_name, None)
        self.identities.pop(adapter_name, None)
        self.last_for.discard(adapter_name)
        super().delete_adapter(adapter_name)

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

    def cache_layer_in_call(self, call: ModelCall) -> SparseCacheLayer:
        """Make a new, empty cache layer in a call of the model that is going to fill it."""
        layer: Any = self.cache_layer()
        layer.call = call
        call.layers += 1
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
        """Tell whether a decoding step, as it is used now, needs of the layer its tensors and its cache layer alone.

        Then a step that is compiled for one layer serves all, see `patches.compiled_layers`. The cache layer has a
        method `lent_to(attention)`: it returns one with the same memory for the attention of another layer.
        """
        return False

    def make_cache_layer(self) -> Any:
        """Make the cache layer of this module, of `cache_layer_type`; called for causal attention alone."""
        return self.cache_layer_type()

    def request_state(self, head_dim: int, dtype: torch.dtype) -> tuple[StateTensor, ...] | None:
        """Describe the state of one request, which a pool holds a row for; `None` if it grows with the text.

        Tensors with larger numbers come first, so that those of a row can lie one after another in memory.

        Args:
            head_dim: size of a key or value of one head.
            dtype: of keys and values.
        """
        return None

    def shard(self, index: int, count: int) -> Self:
        """Return what one of `count` processes attends with that share the KV heads: the layer itself if it is one.

        Where there are more processes than KV heads, several have the same head.
        """
        if count == 1:
            return self
        raise NotImplementedError

    @property
    def prompt_edge(self) -> int | None:
        """Return up to how many tokens a text is read in another way than a longer one, 0 if all are read alike.

        A recorded prompt, which is padded, stays on its side of it, see `patches.recorded_prompts`.

        Returns:
            `None` if the cache layer cannot be filled by a recording, or what fills it waits for the device.
        """
        return None

    @property
    def dense_tokens(self) -> int:
        """Count the tokens up to which a text has dense attention, and nothing of it leaves the state of a request."""
        return 0

    def attend_chunk(
        self,
        states: Sequence[Tensor],
        row: Tensor,
        source: Tensor,
        is_first: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attend with the next tokens of one request, and write its state; see `attend` for the tensors, with `B` 1.

        Args:
            states: `[rows, *shape]` for each tensor of `request_state`, in a dense order from the second dimension on.
            row: `[1]` int64, the row of the request.
            source: `[1]` int64, the row that its state is read from, mostly the same.
            is_first: whether the text begins with these tokens; no state is then read.
        """
        raise NotImplementedError

    def attend_chunks(
        self,
        states: Sequence[Tensor],
        rows: Tensor,
        sources: Tensor,
        chunks: ChunkGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attend with the next tokens of several requests, and write their states.

        Args:
            states: as for `attend_chunk`.
            rows: `[B]` of integers, the row of each request.
            sources: `[B]` of integers, the rows that the states are read from; where they are others, another tensor.
            chunks: lays the tokens side by side.
            query: `[N, Hq, D]`; key, value: `[N, Hkv, D]`; hidden_states: `[N, C]`, packed tokens.
            scaling: multiplies the logits.

        Returns:
            `[n, Hq, D]`, of the tokens of the pieces, `chunks.tokens`.
        """
        raise NotImplementedError

    def attend_steps(
        self,
        states: Sequence[Tensor],
        rows: Tensor,
        sources: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Take a decoding step of several requests, and write their states; see `attend` for the tensors.

        Args:
            states: as for `attend_chunk`.
            rows: `[B]` int64, the row of each request.
            sources: `[B]` int64, the rows that the states are read from, mostly the same.
        """
        raise NotImplementedError

    @property
    def lora(self) -> nn.ModuleDict:
        """Return the `LowRank` of each adapter that has one."""
        return getattr(self, self.adapter_layer_names[1])

    def low_rank(self, name: str, states: Tensor) -> Tensor | None:
        """Return what LoRA adds to the output of the linear layer `name` for its input `[..., inputs]`, or `None`."""
        if not self.is_active or self.dense_window or self.active not in self.lora:
            return None
        return self.lora[self.active](name, states)

    @property
    def config(self) -> ConfigT:
        """Return the configuration of the active adapter."""
        return self.configs[self.active]

    @property
    def is_active(self) -> bool:
        """Tell whether this module attends sparsely: it is on, and the adapter in use has parameters here."""
        return not self._disable_adapters and self.is_used

    def is_learning(self, cache: Any) -> bool:
        """Tell whether a forward is one to learn from: in `train` mode, unless it fills a cache without gradients."""
        return self.training and (cache is None or torch.is_grad_enabled())

    @property
    def is_used(self) -> bool:
        """Tell whether the adapter in use has parameters here; none is in use after the last one was deleted."""
        names = self._active_adapter  # not by PEFT's properties: every call of the model asks this of every layer
        return bool(names) and self.active in self.configs

    @property
    def active(self) -> str:
        """Return the name of the one adapter in use."""
        names = self._active_adapter
        if type(names) is list and len(names) == 1:
            return names[0]
        if not isinstance(names, str):
            raise ValueError(f"sparse attention needs exactly one active adapter, got {names}")
        return names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch as `switch` does; PEFT calls this.

        Its own layers freeze all adapters and unfreeze the active one afterwards, also one that was frozen before.
        """
        self.switch(enabled)

    def switch(self, enabled: bool) -> None:
        """Turn sparse attention on, or off for the dense base model; what is frozen stays so, and what is not."""
        self._disable_adapters = not enabled
        if self.on_toggle is not None:
            self.on_toggle(enabled)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter that PEFT made without memory (`low_cpu_mem_usage`) and then loaded."""
        self.to(device or self.base_device)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Refuse `torch.nn.DataParallel`, whose copies hold tensors in place of parameters: nothing would be learned.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "torch.nn.DataParallel, which transformers' Trainer uses where one process sees several GPUs, cannot hold "
            "sparse attention: start one process per GPU (torchrun), or show this one a single GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("sparse attention selects keys; there are no weights that it could be merged into")

    def unmerge(self) -> None:
        raise ValueError("sparse attention is never merged")
