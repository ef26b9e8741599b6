"""Let PEFT drive `hf_sparse.patches`, as a tuner."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from hf_sparse._compat import register_with_peft
from hf_sparse.core.config import SparseConfig
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.registry import Method, add_method, method_of
from hf_sparse.embeddings import embeddings_of, has_new_embeddings
from hf_sparse.errors import WeightsError
from hf_sparse.patches.attach import attach, detach
from hf_sparse.patches.attached import sparse_layers
from hf_sparse.patches.base import family_of
from hf_sparse.patches.heads import choose_modules_to_save
from hf_sparse.patches.other_adapters import is_other_adapter
from hf_sparse.patches.targets import check_one_method, targets
from hf_sparse.weights import check_names, check_values, layouts

#: How the names of the base model's parameters begin in a `PeftModel`.
PREFIX = "base_model.model."


class SparseModel(BaseTuner):
    """Attach a method to a model for `peft.get_peft_model`; each method has a subclass with its `prefix`."""

    tuner_layer_cls = SparseAttentionLayer

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **options: Any) -> None:
        self.in_peft_model = isinstance(peft_config, dict)  # transformers passes the configuration alone
        if self.in_peft_model:
            # First: PEFT adds to the configurations of the model before it looks at it.
            _check_unpatched(model, peft_config[adapter_name])
        self.below: dict[str, Any] = {}  # configurations of a frozen adapter of another type
        configs = getattr(model, "peft_config", None)
        if self.in_peft_model and configs and not any(isinstance(c, SparseConfig) for c in configs.values()):
            self.below = configs
            del model.peft_config  # its own `PeftModel` has it too, and PEFT would add ours to it
        super().__init__(model, peft_config, adapter_name, *args, **options)

    def inject_adapter(
        self,
        model: Any,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        given = _sparse(self.peft_config[adapter_name])
        # The caller may use the configuration again: this adapter has its own, which is read-only once it is attached.
        config = self.peft_config[adapter_name] = copy.deepcopy(given)
        # The configuration and the model say which modules; the keys of a state dict could only disagree. PEFT
        # matches these names by suffix and shortens a long list to what is still unambiguous.
        new = config.base_shape is None
        modules, config.base_shape = targets(model, config)
        config.target_modules = [name for name, _ in modules]
        choose_modules_to_save(model, config, new=new)
        # PEFT's classes for task types, which put names into it before, go on with those of the caller's object.
        given.modules_to_save = copy.copy(config.modules_to_save)
        if config.modules_to_save and not self.in_peft_model:
            raise ValueError(
                f"modules_to_save={config.modules_to_save} is for a PeftModel (peft.get_peft_model, "
                "PeftModel.from_pretrained, hf_sparse.from_pretrained): transformers' own add_adapter and load_adapter "
                "do not load such modules in every version, and switch them off and not on again"
            )
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        attach(target, self.model, adapter_name, _sparse(peft_config))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select what PEFT saves of an adapter: what it learned, and embeddings that the base's checkpoint lacks.

        Raises:
            WeightsError: weights are of a dtype that adapters do not have, or not finite.
        """
        config = _sparse(config)
        selected = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        # PEFT selects what all of its layers hold, those of a frozen adapter below too.
        below = tuple(f"{name}." for name, module in model.named_modules() if is_other_adapter(module))
        selected = {key: tensor for key, tensor in selected.items() if not key.startswith(below)}
        base, prefix = _base_of(model)
        name = config.base_model_name_or_path or base.name_or_path
        if config.saves_embeddings or has_new_embeddings(base, name, config.revision):
            config.saves_embeddings = True
            names = {id(tensor): key for key, tensor in reversed(embeddings_of(base, prefix).items())}
            selected |= {key: state_dict[key] for key in names.values() if key in state_dict}
        check_values(layouts(selected), selected.__getitem__, method_of(config).layer.unfitted)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give the weights that PEFT loads the names that they have in the model, if they are what it asks for.

        Raises:
            WeightsError: weights are missing, unexpected, of another shape or dtype, or not finite. The adapter is
                taken off again.
        """
        state = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        base, prefix = _base_of(model)
        try:
            _check_loaded(base, prefix, adapter_name, _sparse(config), state)
        except WeightsError:
            _take_off(model, base, adapter_name)
            raise
        return state

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter per row, which PEFT asks for here; for tuners that do not answer it drops the names."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"all rows of a batch have the adapter in use, {', '.join(self.active_adapters)!r}, and adapter_names "
                "asks for one per row: choose one with set_adapter, and run the rows of each adapter by themselves"
            )
        yield

    def disable_adapter_layers(self) -> None:
        """Switch sparse attention off; a frozen adapter of another type below stays on, as PEFT's own would not."""
        self._switch(False)

    def enable_adapter_layers(self) -> None:
        """Switch sparse attention on again; an adapter below stays frozen."""
        self._switch(True)

    def _switch(self, enabled: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, SparseAttentionLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)

    def unload(self) -> nn.Module:
        """Take sparse attention off and return the base model, with the trained modules of `modules_to_save`."""
        detach(self.model)
        if self.below:
            self.model.peft_config = self.below
        else:  # or PEFT would warn of a second adapter in the place of none
            vars(self.model).pop("peft_config", None)
        # Not PEFT's own: it looks for a `weight` on whatever it takes the wrapper off.
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                trained = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(self.model.get_submodule(parent), child, trained)
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse to merge.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "sparse attention selects keys, and there are no weights to merge that into; unload() gives the base "
            "model, and hf_sparse.hub.save_full_model(model, folder, form='merged') one with LoRA in its weights"
        )


def _check_unpatched(model: Any, config: Any) -> None:
    """Refuse a model that has sparse attention already, or is no model of transformers, before a `PeftModel` is made.

    Raises:
        UnsupportedModelError: a `PeftModel`, another module, or a family without a patch.
        ValueError: PEFT would put new parameters in place of those of an adapter, and leave the base model trainable.
    """
    family_of(model)
    check_one_method(model, config)
    if layer := next((layer for layer in sparse_layers(model) if layer.configs), None):
        raise ValueError(
            f"the model has {layer.label} attention already (adapter {', '.join(layer.configs)}), and what it learned "
            "would be lost: add another adapter with add_adapter of its PeftModel; or load its state_dict into a new "
            "PeftModel, as docs/sparsify.md shows; or take it off first (hf_sparse.unpatch)"
        )


def _sparse(config: PeftConfig) -> SparseConfig:
    """Return the configuration of a method, as which PEFT hands on what it only knows as one of its own."""
    assert isinstance(config, SparseConfig), type(config)
    return config


def _base_of(model: Any) -> tuple[Any, str]:
    """Return the base model in what PEFT hands on, and how the names of its parameters begin there."""
    return (model.get_base_model(), PREFIX) if isinstance(model, PeftModel) else (model, "")


def _check_loaded(base: Any, prefix: str, adapter: str, config: SparseConfig, state: dict[str, Tensor]) -> None:
    """Check what PEFT is about to load into an adapter, by its names in the model."""
    learned = tuple(
        f"{prefix}{name}.{container}.{adapter}."
        for name, module in base.named_modules()
        if isinstance(module, SparseAttentionLayer)
        for container in module.adapter_layer_names
    )
    expected = {
        f"{prefix}{key}": tuple(tensor.shape)
        for key, tensor in base.state_dict().items()
        if f"{prefix}{key}".startswith(learned)
    }
    # Without a PeftModel the names of what is no adapter's still begin as in one; the names of heads are PEFT's.
    given = {
        key if prefix else key.removeprefix(PREFIX): tensor
        for key, tensor in state.items()
        if ".modules_to_save." not in key
    }
    embeddings = embeddings_of(base, prefix)
    tokens = check_names(layouts(given), expected, embeddings)
    size = next((len(tensor) for tensor in embeddings.values()), None)
    if config.saves_embeddings and tokens is None:
        raise WeightsError("the embeddings that the adapter brings are missing")
    if tokens not in (None, size):
        raise WeightsError(
            f"the adapter brings embeddings of {tokens} tokens, and the base model has {size}: call "
            f"resize_token_embeddings({tokens}) on it first"
        )
    check_values(layouts(state), state.__getitem__, method_of(config).layer.unfitted)
    for key, tensor in embeddings.items():
        for other, same in embeddings.items():
            if tensor is same and key in given and other in given and not torch.equal(given[key], given[other]):
                raise WeightsError(f"{key} and {other} are one parameter of the base model, and differ")


def _take_off(model: Any, base: Any, adapter: str) -> None:
    """Remove an adapter that could not be loaded, and with the last one all that was attached."""
    for layer in sparse_layers(base):
        if adapter in layer.configs:
            layer.delete_adapter(adapter)
    model.peft_config.pop(adapter, None)
    if not any(layer.configs for layer in sparse_layers(base)):
        detach(base)
        vars(base).pop("peft_config", None)


def register_method(method: Method) -> Method:
    """Add a method to the list that all code asks, and make it known to PEFT; the second time does nothing.

    Raises:
        ValueError: another method has its name in PEFT.
        CompatibilityError: PEFT no longer registers methods as this function expects.
    """
    add_method(method)
    register_with_peft(method.peft_type, config=method.config, tuner=method.tuner, prefix=method.prefix)
    return method
