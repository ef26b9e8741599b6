"""Hold what one attention module learns, by adapter, as PEFT asks its layers to."""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar
from uuid import uuid4

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.core.config import SparseConfig
from hf_sparse.core.lora import LowRank

ConfigT = TypeVar("ConfigT", bound=SparseConfig)


class Switch(Protocol):
    """Describe what a patched model has once for all its layers, as `patches.switch.ModelSwitch` does.

    Attributes:
        model: returns the model, or `None` once nobody else holds it.
        prompts: its recorded prompts.
    """

    model: Callable[[], Any]
    prompts: Any

    def __call__(self, enabled: bool) -> None:
        """Note that the method is switched on or off."""

    def modules(self) -> list[nn.Module]:
        """Return the patched attention modules of the model."""


class AdapterLayer(nn.Module, BaseTunerLayer, Generic[ConfigT]):
    """Hold the adapters of one attention module, of which one is in use, and switch them on and off.

    It speaks PEFT's layer protocol (`adapter_layer_names`, `set_adapter`, `enable_adapters`, ...), so that saving,
    switching and disabling need no second implementation; it works without a `PeftModel` all the same. Subclasses
    have two containers of learned modules by adapter, named in `adapter_layer_names`: their own, and one for LoRA, for
    the adapters with a `lora_rank`.

    Attributes:
        configs: the configuration of each adapter.
        identities: a text for each adapter that no other adapter has, for a name can be used again.
        last_for: the adapters for which no later layer is patched.

    The patch that attaches the layer sets the rest:

    Attributes:
        is_managed: tells whether transformers manages the adapters of the model (its own `add_adapter` and
            `load_adapter`).
        model_switch: what the layers of the model share; it is called when the method is switched on or off.
        hooks: what to remove with the layer.
        base_device: the device of the attention module.
        linears: sizes (inputs, outputs) of the linear layers of the attention module where LoRA changes them, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self.configs: dict[str, ConfigT] = {}
        self.identities: dict[str, str] = {}
        self.last_for: set[str] = set()
        self.is_managed: Callable[[], bool] | None = None
        self.model_switch: Switch | None = None
        self.hooks: list[RemovableHandle] = []
        self.base_device: torch.device | None = None
        self.linears: dict[str, tuple[int, int]] = {}

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

    # PEFT's layers have those of the layer that they wrap. This one wraps none, and would look for them in itself
    # without end where each module is asked for a weight (`hasattr`), as by what quantises, prunes or traces a model.
    @property
    def weight(self) -> Any:
        raise AttributeError(f"{type(self).__name__} wraps no layer and has no weight")

    @property
    def bias(self) -> Any:
        raise AttributeError(f"{type(self).__name__} wraps no layer and has no bias")

    @property
    def lora(self) -> nn.ModuleDict:
        """Return the `LowRank` of each adapter that has one."""
        return getattr(self, self.adapter_layer_names[1])

    @property
    def config(self) -> ConfigT:
        """Return the configuration of the active adapter."""
        return self.configs[self.active]

    @property
    def is_active(self) -> bool:
        """Tell whether this module attends sparsely: it is on, and the adapter in use has parameters here."""
        return not self._disable_adapters and self.is_used

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
        if self.model_switch is not None:
            self.model_switch(enabled)

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
