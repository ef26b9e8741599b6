"""What every method is to the layers above: a module attached to one attention module of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from uuid import uuid4

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import CacheLayerMixin

from hf_sparse.core.lora import LowRank

NO_CACHE = "a bidirectional attention module sees all tokens at once and has no KV cache: pass none"


@dataclass(frozen=True)
class AttentionShape:
    """The attention module that a method is attached to.

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


class SparseAttentionLayer(nn.Module, BaseTunerLayer):
    """One sparse attention method, attached to one attention module as its child `sparse_attention`.

    It speaks PEFT's layer protocol (`adapter_layer_names`, `set_adapter`, `enable_adapters`, ...), so that saving,
    switching and disabling need no second implementation; it works without a `PeftModel` all the same. Subclasses
    have two containers of learned modules by adapter, named in `adapter_layer_names`: their own, and one for LoRA, for
    the adapters with a `lora_rank`. They write `at`, `make_parameters`, `attend` and `cache_layer`.

    Attributes:
        label: what messages call the method.
        fits: the fields of `AttentionShape` that the shapes of its parameters depend on.
        unfitted: names of its buffers that are NaN until they are fitted.
        cache_layer_type: the class of what `cache_layer` makes.
        has_slots: whether it keeps a fixed number of keys and forgets the others; otherwise its cache holds them all.
        layer, causal: see `AttentionShape`.
        configs: the configuration of each adapter.
        last_for: the adapters for which no later layer is patched.
        identities: of adapters: a name can be used again.
    """

    label: ClassVar[str]
    fits: ClassVar[tuple[str, ...]]
    unfitted: ClassVar[tuple[str, ...]] = ()
    cache_layer_type: ClassVar[type[CacheLayerMixin]]
    has_slots: ClassVar[bool]
    layer: int
    causal: bool

    @classmethod
    def at(cls, site: AttentionShape) -> Self:
        """The method for one attention module, without adapters yet."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self.configs: dict[str, Any] = {}
        self.identities: dict[str, str] = {}
        # Set by the patch that attaches the method: whether transformers manages the adapters of the model (its own
        # `add_adapter` and `load_adapter`), what to tell when the method is switched on or off, the hooks to remove,
        # the device of the attention module, and the sizes of its linear layers where LoRA changes them.
        self.is_managed: Callable[[], bool] | None = None
        self.on_toggle: Callable[[bool], None] | None = None
        self.hooks: list[RemovableHandle] = []
        self.home: torch.device | None = None
        self.linears: dict[str, tuple[int, int]] = {}
        self.last_for: set[str] = set()
        self.beside_local = False  # whether the model has layers with a sliding window of their own

    @classmethod
    def check(cls, config: Any, site: AttentionShape) -> None:
        """Raise `ValueError` for a configuration that does not fit the model; called before anything changes."""

    def make_parameters(self, config: Any) -> nn.Module:
        """New learned parameters of one adapter."""
        raise NotImplementedError

    def add_adapter(self, name: str, config: Any) -> None:
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
        cache: CacheLayerMixin | None,
        scaling: float,
    ) -> Tensor:
        """Compute the attention of the new tokens.

        Args:
            query: `[B, Hq, T, D]` of the new tokens, positions applied.
            key, value: `[B, Hkv, Tk, D]`, what the cache returned; without one, or of slots, those of the new tokens.
            hidden_states: `[B, T, C]`, the input of the attention module.
            valid: `[B, Tk]` bool, False for padding; `None` if every token is real.
            cache: the layer that `cache_layer` made for this sequence, or `None`.
            scaling: multiplies the logits.

        Returns:
            `[B, Hq, T, D]`; what stands at padding is finite and meaningless.
        """
        raise NotImplementedError

    def check_cache(self, cache: Any) -> None:
        """Raise `ValueError` for a cache layer that this forward cannot go on with, before it counts new tokens.

        Args:
            cache: what `cache_layer` made.
        """

    def cache_layer(self) -> CacheLayerMixin:
        """A new, empty cache layer for one sequence batch.

        Besides what transformers asks of a cache layer it has `announced` and `settle`. The patch sets `announced`
        before each forward of the attention module and calls `settle` after the attention, so that `update` can tell a
        model that attends densely by now. A layer of slots also has `empty`, `seen`, `cumulative_length`, `expect` and
        `only_sparse`: `expect(real)` gets the count of real tokens per row that a mask shows before the new ones, and
        `only_sparse` is False if dense layers with full attention may share the cache.
        """
        raise NotImplementedError

    @property
    def lora(self) -> nn.ModuleDict:
        """The `LowRank` of each adapter that has one."""
        return getattr(self, self.adapter_layer_names[1])

    def low_rank(self, name: str, states: Tensor) -> Tensor | None:
        """What LoRA adds to the output of the linear layer `name` for its input `[..., inputs]`; `None` for nothing."""
        if not self.is_active or self.active not in self.lora:
            return None
        return self.lora[self.active](name, states)

    @property
    def config(self) -> Any:
        """Configuration of the active adapter."""
        return self.configs[self.active]

    @property
    def is_active(self) -> bool:
        """Whether this module attends sparsely: it is switched on, and the adapter in use has parameters here."""
        return not self.disable_adapters and self.is_used

    def is_learning(self, cache: CacheLayerMixin | None) -> bool:
        """Tell a forward to learn from: in `train` mode, unless it generates, which fills a cache without gradients."""
        return self.training and (cache is None or torch.is_grad_enabled())

    @property
    def is_used(self) -> bool:
        """Whether the adapter in use has parameters here; none is in use after the last one was deleted."""
        names = self.active_adapters  # read once: a decoding step asks this of every layer
        return bool(names) and self._only(names) in self.configs

    @property
    def active(self) -> str:
        """The name of the one adapter in use."""
        return self._only(self.active_adapters)

    @staticmethod
    def _only(names: list[str]) -> str:
        if len(names) != 1:
            raise ValueError(f"sparse attention needs exactly one active adapter, got {names}")
        return names[0]

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
        """PEFT's last step for an adapter that it made without memory (`low_cpu_mem_usage`) and then loaded."""
        self.to(device or self.home)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Called by `torch.nn.DataParallel`, whose copies hold tensors in place of parameters: scorers would not learn.

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


def token_index(valid: Tensor | None, seen: Tensor | int, batch: int, length: int, device: torch.device) -> Tensor:
    """Index of each new token among the real tokens of its row: `[B, T]` int64; padding repeats a neighbour's.

    Args:
        valid: `[B, T]` bool or `None`.
        seen: real tokens of each row before these, `[B]` or one number.
    """
    if valid is None:
        index = torch.arange(length, device=device).expand(batch, -1)
    else:
        index = (valid.cumsum(-1) - 1).clamp(min=0)
    return index + (seen[:, None] if isinstance(seen, Tensor) else seen)
