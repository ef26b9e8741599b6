"""Attach a method to a model and take it off again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.errors import AdapterMismatchError, UnsupportedModelError
from hf_sparse.methods.base import SparseMethod
from hf_sparse.methods.sparsek import SparseKAttention, SparseKConfig
from hf_sparse.patches.base import Family, family_of
from hf_sparse.patches.interface import NAME, before_attention

CHILD = "sparse_attention"


def methods_of(model: nn.Module) -> list[SparseKAttention]:
    """The attached methods of a model, in the order of its layers; empty if it is not patched."""
    return [module for module in model.modules() if isinstance(module, SparseKAttention)]


def methods_in_use(model: nn.Module) -> list[SparseKAttention]:
    """The attached methods that have the adapter in use; adapters may have been given different layers."""
    return [method for method in methods_of(model) if method.active in method.configs]


def targets(model: PreTrainedModel, config: SparseKConfig) -> list[tuple[str, nn.Module]]:
    """Names and attention modules that a configuration wants patched, with everything checked first.

    Raises:
        UnsupportedModelError: no patch for this model.
        AdapterMismatchError: the configuration was made for another base model.
        ValueError: `layers` names a layer that is not there, or one that attends locally.
    """
    family = family_of(model)
    found = list(family.modules(model))
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} holds no attention module that can be patched")
    if reason := family.refusal(model):
        raise UnsupportedModelError(f"{type(model).__name__} cannot be patched: {reason}")
    local = [i for i, (_, module) in enumerate(found) if family.is_local(module)]
    if len(local) == len(found):
        window = getattr(model.config, "sliding_window", None)
        raise UnsupportedModelError(
            f"every attention layer of this {type(model).__name__} is local already (a sliding window of {window} "
            "tokens), and sparse attention replaces full attention; load the model with sliding_window=None, which "
            "changes nothing for texts that fit into the window"
        )
    _check_shape(_shape(model, family, found), config)
    if config.layer_shares is not None and len(config.layer_shares) != len(found):
        raise ValueError(
            f"layer_shares has {len(config.layer_shares)} entries, and the model has {len(found)} attention layers"
        )
    if config.layers is None:
        return [pair for i, pair in enumerate(found) if i not in local]
    beyond = [i for i in config.layers if i >= len(found)]
    if beyond:
        raise ValueError(f"layers {beyond} do not exist: the model has {len(found)} attention layers, 0 first")
    if wrong := [i for i in config.layers if i in local]:
        rest = [i for i in range(len(found)) if i not in local]
        raise ValueError(
            f"layers {wrong} attend within a sliding window of their own and stay as they are; choose among {rest}"
        )
    return [found[i] for i in config.layers]


def attach(module: nn.Module, model: PreTrainedModel, adapter: str, config: SparseKConfig) -> SparseMethod:
    """Attach one adapter to one attention module; a second adapter joins the first."""
    method = getattr(module, CHILD, None)
    others = methods_of(model)
    if method is None:
        family = family_of(model)
        switch = others[0].on_toggle if others else _Switch(model.config)  # one for all layers of a model
        layer = next(i for i, (_, other) in enumerate(family.modules(model)) if other is module)
        method = SparseKAttention(
            family.hidden_size(module), family.num_key_value_heads(module), layer, family.causal(module)
        )
        method.train(module.training)
        method.on_toggle = switch
        method.beside_local = any(family.is_local(other) for _, other in family.modules(model))
        method.hook = module.register_forward_pre_hook(before_attention, with_kwargs=True)
        module.add_module(CHILD, method)
        method.enable_adapters(True)
    method.add_adapter(adapter, config)
    if others and method.active != others[0].active:
        # One adapter is in use, in the layers that have it and in those that do not.
        method.set_adapter(others[0].active)
    method.home = next(parameter.device for parameter in module.parameters())
    if not any(parameter.is_meta for parameter in method.parameters()):  # PEFT may want them empty first
        if method.home.type == "meta":
            raise UnsupportedModelError(
                "the base model is offloaded: its weights are on no device, and nothing could be trained or scored "
                "there; load it without offloading"
            )
        method.to(method.home)
    return method


def detach(model: nn.Module) -> None:
    """Remove every attached method: the module tree, hooks and attention implementation are as before."""
    for module in list(model.modules()):
        method = getattr(module, CHILD, None)
        if isinstance(method, SparseMethod):
            if method.hook is not None:
                method.hook.remove()
            if method.on_toggle is not None:
                method.on_toggle(False)
            delattr(module, CHILD)


def patch(model: PreTrainedModel, config: SparseKConfig, adapter: str = "default") -> PreTrainedModel:
    """Give a pretrained model sparse attention, in place.

    Args:
        model: a transformers model of a supported family.
        config: the method and its budget.
        adapter: name of the adapter; a second name adds a second adapter, `set_adapter` switches.

    Returns:
        The same model. Only the scorers are new; freeze the rest yourself, or use `peft.get_peft_model`.

    Raises:
        UnsupportedModelError: no patch for this model; the message lists what is supported.
    """
    config = copy.deepcopy(config)  # what it was attached to is noted in it
    modules = targets(model, config)
    if any(adapter in method.configs for method in methods_of(model)):
        raise ValueError(f"the model has an adapter {adapter!r} already; unpatch it first or choose another name")
    for _, module in modules:
        attach(module, model, adapter, config)
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Take sparse attention off again: outputs are bit for bit those of the base model."""
    family_of(model)  # a PeftModel has unload() for this
    if not methods_of(model):
        raise ValueError("the model is not patched")
    detach(model)
    return model


@contextmanager
def patched(model: PreTrainedModel, config: SparseKConfig) -> Iterator[PreTrainedModel]:
    """Patch for the length of a `with` block."""
    if methods_of(model):
        raise ValueError("the model is patched already: unpatch it first")
    patch(model, config)
    try:
        yield model
    finally:
        unpatch(model)


class _Switch:
    """Sets the attention implementation of a model's config: ours while the method is on, the base's while off."""

    def __init__(self, config: Any) -> None:
        if config._attn_implementation == NAME:
            raise ValueError(
                "the model's config is shared with another patched model, and the two could not be switched apart, or "
                "was copied from one: give each model a config of its own (copy.deepcopy), and in a copy set "
                "config._attn_implementation to what the base model uses, such as 'sdpa'"
            )
        self.config = config
        self.base = config._attn_implementation

    def __call__(self, enabled: bool) -> None:
        self.config._attn_implementation = NAME if enabled else self.base


def _shape(model: PreTrainedModel, family: Family, found: list[tuple[str, nn.Module]]) -> dict[str, Any]:
    """What an adapter depends on."""
    first = found[0][1]
    return {
        "model_type": model.config.model_type,
        "hidden_size": family.hidden_size(first),
        "num_key_value_heads": family.num_key_value_heads(first),
        "num_attention_layers": len(found),
        "model_class": type(model).__name__,
    }


def _check_shape(shape: dict[str, Any], config: SparseKConfig) -> None:
    if config.base_shape is None:
        config.base_shape = shape
        return
    wrong = [
        f"{key}: {config.base_shape.get(key)} there, {value} here"
        for key, value in shape.items()
        # The class is for loading; whether it fits is a matter of the weights' names.
        if key != "model_class" and config.base_shape.get(key) != value
    ]
    if wrong:
        raise AdapterMismatchError(
            "the adapter was made for another base model ("
            + "; ".join(wrong)
            + "); a new adapter needs a SparseKConfig "
            "of its own"
        )
