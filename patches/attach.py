"""Attach a method to a model and take it off again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.core.config import SparseConfig
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.registry import method_of
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.patches.attached import CHILD, sparse_layers
from hf_sparse.patches.base import family_of
from hf_sparse.patches.derived_class import restore_class
from hf_sparse.patches.lora import enable_lora
from hf_sparse.patches.other_adapters import refuse_training_around
from hf_sparse.patches.sparse_class import set_sparse_class
from hf_sparse.patches.switch import ModelSwitch
from hf_sparse.patches.targets import targets


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
        # One for all layers of a model.
        switch: Any = others[0].model_switch if others else ModelSwitch(model, family.backbone(model))
        layer = next(i for i, (_, other) in enumerate(family.modules(model)) if other is module)
        attention = method_of(config).layer.for_shape(family.shape_of(module, layer))
        attention.train(module.training)
        attention.is_managed = switch.is_managed
        attention.model_switch = switch
        attention.has_local_neighbours = any(family.is_local(other) for _, other in family.modules(model))
        hook = set_sparse_class(module)
        if hook is not None:
            attention.hooks.append(hook)
        switch.forget_modules()
        if not others:
            attention.hooks.append(module.register_forward_pre_hook(refuse_training_around))
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
    learned = [*attention.parameters(), *attention.buffers()]
    if learned and not any(tensor.is_meta for tensor in learned):  # PEFT may want them empty first
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
            if isinstance(attention.model_switch, ModelSwitch):
                attention.model_switch.remove()
            delattr(module, CHILD)
            restore_class(module)


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
