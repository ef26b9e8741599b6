"""Attach a method to a model and take it off again."""

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, overload

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from hf_sparse.core.config import SparseConfig
from hf_sparse.core.layer import AttentionShape, SparseAttentionLayer
from hf_sparse.core.registry import method_of
from hf_sparse.errors import AdapterMismatchError, UnsupportedModelError
from hf_sparse.patches.base import family_of
from hf_sparse.patches.compiled_layers import compiled_layers
from hf_sparse.patches.interface import NAME, before_attention
from hf_sparse.patches.lora import check_lora, enable_lora
from hf_sparse.patches.recorded_prompts import PromptCaller, RecordedPrompts
from hf_sparse.patches.recorded_steps import RecordedSteps, may_record

CHILD = "sparse_attention"

M = TypeVar("M", bound=SparseAttentionLayer)


@overload
def sparse_layers(model: nn.Module) -> list[SparseAttentionLayer]: ...
@overload
def sparse_layers(model: nn.Module, kind: type[M]) -> list[M]: ...
def sparse_layers(model: nn.Module, kind: type[SparseAttentionLayer] = SparseAttentionLayer) -> list[Any]:
    """Return the sparse attention layers of a model in order; none if it is not patched, or with another kind."""
    return [module for module in model.modules() if isinstance(module, kind)]


@overload
def sparse_layers_in_use(model: nn.Module) -> list[SparseAttentionLayer]: ...
@overload
def sparse_layers_in_use(model: nn.Module, kind: type[M]) -> list[M]: ...
def sparse_layers_in_use(model: nn.Module, kind: type[SparseAttentionLayer] = SparseAttentionLayer) -> list[Any]:
    """Return the sparse attention layers that have the adapter in use; adapters may be in different layers."""
    return [layer for layer in sparse_layers(model, kind) if layer.is_used]


def check_other_adapters(model: nn.Module) -> None:
    """Refuse a model with another method's PEFT layers in it, such as LoRA, unless they are frozen.

    Over frozen ones sparse attention is trained, and each of the two is saved and loaded by itself. transformers' own
    `load_adapter` has one of the two on at a time.

    Raises:
        ValueError: there are such layers, and they are trainable or managed by transformers.
    """
    layers = list(_foreign(model))
    if not layers:
        return
    is_trainable = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    if is_trainable or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the base model has layers of another PEFT adapter ({_name(layers[0])}), which is trainable or was loaded "
            "by transformers: merge them first (merge_and_unload() of the PeftModel) and save that model as the base, "
            "or load the adapter frozen (PeftModel.from_pretrained(base, ...).get_base_model()) and patch that, or use "
            "lora_rank for LoRA beside"
        )


def _note_other_adapters(model: nn.Module, config: SparseConfig, base_shape: dict[str, Any]) -> dict[str, Any]:
    """Note in a new adapter what other PEFT layers it is made over, and warn where an old one misses them."""
    kinds = sorted({_name(layer).split(".")[2] for layer in _foreign(model)})
    if config.base_shape is None:
        return {**base_shape, "over": kinds} if kinds else base_shape
    missing = [kind for kind in base_shape.get("over", []) if kind not in kinds]
    if missing and not next(model.parameters()).is_meta:
        warnings.warn(
            f"the adapter was made over another PEFT adapter ({', '.join(missing)}), which this base model does not "
            "have: load that one first, PeftModel.from_pretrained(base, ...), and this one on its get_base_model()",
            stacklevel=2,
        )
    return base_shape


def is_other_adapter(module: nn.Module) -> bool:
    """Tell whether a module is a PEFT layer that is not ours."""
    return isinstance(module, BaseTunerLayer) and not isinstance(module, SparseAttentionLayer)


def _foreign(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the PEFT layers of a model that are not ours."""
    return (module for module in model.modules() if is_other_adapter(module))


def _name(layer: nn.Module) -> str:
    """Name the class of a layer with its module."""
    return f"{type(layer).__module__}.{type(layer).__name__}"


def _refuse_training_around(module: nn.Module, args: Any) -> None:
    """Refuse to train what PEFT wraps around a patched model later, as a pre-hook of its first attention module.

    Raises:
        ValueError: another PEFT adapter is trained around sparse attention in use. It would be saved as an adapter of
            its own method, from which PEFT drops the rest when it loads.
    """
    attention: Any = getattr(module, CHILD)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not attention.is_active:
        return
    model = attention.on_toggle.model()
    if layer := next((m for m in _foreign(model) if any(p.requires_grad for p in m.parameters())), None):
        raise ValueError(
            f"a PEFT adapter ({_name(layer)}) is trained around sparse attention, and would be loaded without "
            "it: use lora_rank of the configuration, or train the other adapter first, merge_and_unload() it, and patch"
        )


class Targets(NamedTuple):
    """Hold what a configuration is to be attached to.

    Attributes:
        modules: names and attention modules to patch.
        base_shape: sizes of the base model that the adapter depends on, for `SparseConfig.base_shape`.
    """

    modules: list[tuple[str, nn.Module]]
    base_shape: dict[str, Any]


def check_one_method(model: nn.Module, config: SparseConfig) -> None:
    """Raise `ValueError` for a model that has another method than that of a configuration."""
    kind = method_of(config).layer
    if other := next((layer for layer in sparse_layers(model) if type(layer) is not kind), None):
        raise ValueError(
            f"the model has {other.label} attention already, and a model has one method at a time: take it off first "
            f"(unpatch, or unload of a PeftModel), then add {kind.label}"
        )


def targets(model: PreTrainedModel, config: SparseConfig) -> Targets:
    """Find the attention modules that a configuration wants patched, with everything checked first.

    Args:
        model: a transformers model of a supported family.
        config: of a method; it is not changed.

    Raises:
        TypeError: the configuration is of no sparse attention method.
        UnsupportedModelError: no patch for this model.
        AdapterMismatchError: the configuration was made for another base model.
        ValueError: `layers` names a layer that is not there, or one that attends locally; the model is patched with
            another method, or has another PEFT adapter; or the configuration does not fit the size of the model.
    """
    kind = method_of(config).layer
    family = family_of(model)
    check_other_adapters(model)
    check_one_method(model, config)
    modules = list(family.modules(model))
    if reason := family.refusal(model):
        raise UnsupportedModelError(f"{type(model).__name__} cannot be patched: {reason}")
    if not modules:
        raise UnsupportedModelError(f"{type(model).__name__} holds no attention module that can be patched")
    local = [i for i, (_, module) in enumerate(modules) if family.is_local(module)]
    if len(local) == len(modules):
        window = getattr(model.config, "sliding_window", None)
        raise UnsupportedModelError(
            f"every attention layer of this {type(model).__name__} is local already (a sliding window of {window} "
            "tokens), and sparse attention replaces full attention; load the model with sliding_window=None, which "
            "changes nothing for texts that fit into the window"
        )
    shape = family.shape_of(modules[0][1], layer=0)
    base_shape = _note_other_adapters(model, config, _base_shape(model, shape, len(modules), kind, config))
    kind.check(config, shape, len(modules))
    if config.lora_rank:
        if layer := next(_foreign(model), None):
            raise ValueError(f"lora_rank must be 0 over another PEFT adapter ({_name(layer)}), got {config.lora_rank}")
        check_lora(modules[0][1], config.lora_rank)
    chosen = [i for i in range(len(modules)) if i not in local] if config.layers is None else config.layers
    beyond = [i for i in chosen if i >= len(modules)]
    if beyond:
        raise ValueError(f"layers {beyond} do not exist: the model has {len(modules)} attention layers, 0 first")
    if wrong := [i for i in chosen if i in local]:
        rest = [i for i in range(len(modules)) if i not in local]
        raise ValueError(
            f"layers {wrong} attend within a sliding window of their own and stay as they are; choose among {rest}"
        )
    _check_target_modules(config, [modules[i][0] for i in chosen])
    return Targets([modules[i] for i in chosen], base_shape)


def _check_target_modules(config: SparseConfig, patched: list[str]) -> None:
    """Refuse a new configuration that names other modules than those that are patched, as one of LoRA would.

    Raises:
        ValueError: a name that ends no patched module's, or a patched module that no name ends.
    """
    given = config.target_modules
    if given is None or config.base_shape is not None:  # filled in: PEFT may have shortened the names
        return
    ends = [given] if isinstance(given, str) else given
    matches = [(f".{name}".endswith(f".{end}"), end, name) for end in ends for name in patched]
    if {end for hit, end, _ in matches if hit} != set(ends) or {name for hit, _, name in matches if hit} != set(
        patched
    ):
        raise ValueError(
            f"{config.config_name}.target_modules is filled in when an adapter is attached, here with {patched[0]!r} "
            f"and its like, got {given!r}: leave it out, and choose layers with layers=[...]"
        )


def attach(module: nn.Module, model: PreTrainedModel, adapter: str, config: SparseConfig) -> SparseAttentionLayer:
    """Attach one adapter to one attention module; a second adapter joins the first.

    Args:
        module: an attention module that `targets` returned.
        model: that it belongs to.
        adapter: name of the adapter.
        config: of the adapter, the same object for all modules; it is read-only from now on.
    """
    attention = getattr(module, CHILD, None)
    others = sparse_layers(model)
    if attention is None:
        family = family_of(model)
        switch: Any = others[0].on_toggle if others else _Switch(model)  # one for all layers of a model
        layer = next(i for i, (_, other) in enumerate(family.modules(model)) if other is module)
        attention = method_of(config).layer.for_shape(family.shape_of(module, layer))
        attention.train(module.training)
        attention.is_managed = switch.is_managed
        attention.on_toggle = switch
        attention.has_local_neighbours = any(family.is_local(other) for _, other in family.modules(model))
        attention.hooks.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
        switch.forget_modules()
        if not others:
            attention.hooks.append(module.register_forward_pre_hook(_refuse_training_around))
        module.add_module(CHILD, attention)
        attention.enable_adapters(True)
    if config.lora_rank:
        enable_lora(module, attention)
    attention.add_adapter(adapter, config)
    config.mark_attached()
    if not any(adapter in other.configs and other.layer > attention.layer for other in others):
        for other in others:
            other.last_for.discard(adapter)
        attention.last_for.add(adapter)
    if others and others[0].active_adapters not in ([], attention.active_adapters):
        # One adapter is in use, in the layers that have it and in those that do not.
        attention.set_adapter(others[0].active)
    attention.base_device = next(parameter.device for parameter in module.parameters())
    if not any(parameter.is_meta for parameter in attention.parameters()):  # PEFT may want them empty first
        if attention.base_device.type == "meta":
            raise UnsupportedModelError(
                "the base model is offloaded: its weights are on no device, and nothing could be trained or scored "
                "there; load it without offloading"
            )
        attention.to(attention.base_device)
    return attention


def detach(model: nn.Module) -> None:
    """Remove every attached method: the module tree, hooks and attention implementation are as before."""
    for module in list(model.modules()):
        attention = getattr(module, CHILD, None)
        if isinstance(attention, SparseAttentionLayer):
            for hook in attention.hooks:
                hook.remove()
            if isinstance(attention.on_toggle, _Switch):
                attention.on_toggle.remove()
            delattr(module, CHILD)


def patch(model: PreTrainedModel, config: SparseConfig, adapter: str = "default") -> PreTrainedModel:
    """Give a pretrained model sparse attention, in place.

    Args:
        model: a transformers model of a supported family.
        config: the method and its budget. The adapter has a copy of it, whose fields are read-only.
        adapter: name of the adapter; a second name adds a second adapter, `set_adapter` switches.

    Returns:
        The same model. Only the method's parameters are new; freeze the rest yourself, or use `peft.get_peft_model`.

    Raises:
        UnsupportedModelError: no patch for this model; the message lists what is supported.
        TypeError: the configuration is of no sparse attention method.
        AdapterMismatchError: the configuration was made for another base model.
        ValueError: the model has an adapter of this name or of another method, or the configuration does not fit it or
            has `modules_to_save`.
    """
    method_of(config)  # is it a configuration?
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save} is for PEFT, which trains and saves these modules: use "
            "peft.get_peft_model(model, config), or leave it out and train them yourself"
        )
    config = copy.deepcopy(config)  # `base_shape` of the copy is written below
    modules, config.base_shape = targets(model, config)
    if any(adapter in layer.configs for layer in sparse_layers(model)):
        raise ValueError(f"the model has an adapter {adapter!r} already; unpatch it first or choose another name")
    for _, module in modules:
        attach(module, model, adapter, config)
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Take sparse attention off again: outputs are bit for bit those of the base model.

    Raises:
        UnsupportedModelError: a `PeftModel`, which has `unload()` for this.
        ValueError: the model is not patched.
    """
    if not isinstance(model, PreTrainedModel) and hasattr(model, "unload"):
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel that `patch` returned, got {type(model).__name__}: its unload() "
            "returns the base model without the adapter, and its disable_adapter() switches that off for a while"
        )
    family_of(model)
    if not sparse_layers(model):
        raise ValueError(f"expected a patched model, got a {type(model).__name__} without sparse attention")
    detach(model)
    return model


@contextmanager
def patched(model: PreTrainedModel, config: SparseConfig) -> Iterator[PreTrainedModel]:
    """Patch for the length of a `with` block.

    Raises:
        ValueError: the model is patched already; see `patch` for all else.
    """
    if sparse_layers(model):
        raise ValueError("the model is patched already: unpatch it first")
    patch(model, config)
    try:
        yield model
    finally:
        unpatch(model)


class _Switch:
    """Hold what a patched model has once for all its layers.

    Called, it sets the attention implementation of the model's config: ours while the method is on, the base's while
    off. It stands in front of the model's `save_pretrained` and `push_to_hub`, which know nothing of the method, until
    `remove`; and of what `generate` asks whether and how to compile its steps: it may record them instead, and where
    they are to be compiled, compile one layer for all. It stands in front of what reads the prompt there too, which may
    play a recorded one.
    """

    _BEFORE = ("save_pretrained", "push_to_hub", "_valid_auto_compile_criteria", "get_compiled_call", "_prefill")

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        if config._attn_implementation == NAME:
            raise ValueError(
                "the model's config is shared with another patched model, and the two could not be switched apart, or "
                "was copied from one: give each model a config of its own (copy.deepcopy), and in a copy set "
                "config._attn_implementation to what the base model uses, such as 'sdpa'"
            )
        self.model = weakref.ref(model)  # which holds this one: without a cycle it goes when its last user does
        self.config = config
        text = config.get_text_config()  # of a model that reads images too it is a part of the other
        names = ["", *(name for name in config.sub_configs if getattr(config, name, None) is text)]
        self.base = {name: (text if name else config)._attn_implementation for name in names}
        self._modules: list[weakref.ref[nn.Module]] = []
        self.prompts = RecordedPrompts()
        self.records = self.compiles = False  # whether the `generate` that asked last can record steps, and compiles
        for name in self._BEFORE:
            if hasattr(model, name):
                setattr(model, name, getattr(self, name))

    def __call__(self, enabled: bool) -> None:
        self.config._attn_implementation = dict.fromkeys(self.base, NAME) if enabled else self.base

    def modules(self) -> list[nn.Module]:
        """List the patched attention modules; they are looked for once."""
        modules = [module for reference in self._modules if (module := reference()) and CHILD in module._modules]
        if not modules or len(modules) < len(self._modules):
            model: Any = self.model()
            modules = [module for module in model.modules() if CHILD in module._modules]
            self._modules = [weakref.ref(module) for module in modules]
        return modules

    def remove(self) -> None:
        """Leave the model as it was."""
        self(False)
        self.prompts.clear()
        for name in self._BEFORE:
            vars(self.model()).pop(name, None)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self._save("save_pretrained", *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        return self._save("push_to_hub", *args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Answer `generate` whether it shall ask for a call that is compiled, or one that records its steps."""
        model: Any = self.model()
        compiles = type(model)._valid_auto_compile_criteria(model, model_kwargs, generation_config)
        self.records = self.config._attn_implementation == NAME and may_record(model, generation_config)
        self.compiles = compiles
        return compiles or self.records

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return what `generate` calls for a step."""
        model: Any = self.model()
        records, self.records = self.records, False
        if records and not self.compiles:
            return RecordedSteps(model)
        layers = compiled_layers(model) if records else None
        if layers is not None:
            return RecordedSteps(model, layers)
        return type(model).get_compiled_call(model, compile_config)

    def _prefill(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a prompt for `generate`."""
        model: Any = self.model()
        read: Any = type(model)._prefill
        is_whole = generation_config.prefill_chunk_size is None and not generation_config.is_assistant
        is_ordinary = read is GenerationMixin._prefill  # another one may need the model itself
        if (
            is_whole
            and is_ordinary
            and self.config._attn_implementation == NAME
            and may_record(model, generation_config)
        ):
            return read(
                PromptCaller(model, self.modules(), self.prompts), input_ids, generation_config, *args, **kwargs
            )
        return read(model, input_ids, generation_config, *args, **kwargs)

    def forget_modules(self) -> None:
        """Look for the patched modules anew, for one was added."""
        self._modules = []

    def _save(self, name: str, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model()
        # transformers writes the adapters that it manages, and no base model; after the last one there is but the base.
        # Without a model: it was but a value in the expression that called this, and is gone already.
        if self.is_managed() or (model is not None and not any(layer.configs for layer in sparse_layers(model))):
            return getattr(type(model), name)(model, *args, **kwargs)
        raise ValueError(
            f"{name} of a model with sparse attention would write a checkpoint that loads as a dense model: to keep "
            "the adapter, save the PeftModel (its save_pretrained, or hf_sparse.push_to_hub); to keep the base model, "
            "take sparse attention off first (unload of the PeftModel, or hf_sparse.unpatch)"
        )

    @torch.compiler.assume_constant_result  # torch 2.11 cannot trace the weak reference
    def is_managed(self) -> bool:
        """Tell whether transformers manages the adapters of the model.

        A compiled forward keeps the answer it was traced with. It changes only with the modules of the model, as
        adapters come and go, and a compiled forward is traced anew for those.
        """
        return getattr(self.model(), "_hf_peft_config_loaded", False)

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self) | {"model": self.model(), "_modules": []}
        del state["prompts"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"model": weakref.ref(state["model"]), "prompts": RecordedPrompts()})


def _base_shape(
    model: PreTrainedModel,
    shape: AttentionShape,
    num_layers: int,
    kind: type[SparseAttentionLayer],
    config: SparseConfig,
) -> dict[str, Any]:
    """Describe what an adapter depends on: that of the configuration if it has been attached before, or a new one.

    Raises:
        AdapterMismatchError: the configuration was made for another base model.
    """
    base_shape = {
        "model_type": model.config.model_type,
        **{name: getattr(shape, name) for name in kind.shape_fields},
        "num_attention_layers": num_layers,
        "model_class": type(model).__name__,
    }
    if config.base_shape is None:
        return base_shape
    wrong = [
        f"{key}: {config.base_shape.get(key)} there, {value} here"
        for key, value in base_shape.items()
        # The class is for loading; whether it fits is a matter of the weights' names.
        if key != "model_class" and config.base_shape.get(key) != value
    ]
    if wrong:
        raise AdapterMismatchError(
            "the adapter was made for another base model ("
            + "; ".join(wrong)
            + f"); a new adapter needs a {type(config).__name__} of its own"
        )
    return config.base_shape
