"""Look at the PEFT adapters of other methods, such as LoRA, in a model that is patched or going to be."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_sparse.core.config import SparseConfig
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.patches.attached import CHILD


def is_other_adapter(module: nn.Module) -> bool:
    """Tell whether a module is a PEFT layer of another method."""
    return isinstance(module, BaseTunerLayer) and not isinstance(module, SparseAttentionLayer)


def other_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the PEFT layers of other methods in a model."""
    return (module for module in model.modules() if is_other_adapter(module))


def class_name(layer: nn.Module) -> str:
    """Name the class of a layer with its module."""
    return f"{type(layer).__module__}.{type(layer).__name__}"


def check_other_adapters(model: nn.Module) -> None:
    """Refuse a model with another method's PEFT layers in it, such as LoRA, unless they are frozen.

    Over frozen ones sparse attention is trained, and each of the two is saved and loaded by itself. transformers' own
    `load_adapter` has one of the two on at a time.

    Raises:
        ValueError: there are such layers, and they are trainable or managed by transformers.
    """
    layers = list(other_layers(model))
    if not layers:
        return
    is_trainable = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    if is_trainable or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the base model has layers of another PEFT adapter ({class_name(layers[0])}), which is trainable or was "
            "loaded by transformers: merge them first (merge_and_unload() of the PeftModel) and save that model as the "
            "base, or load the adapter frozen (PeftModel.from_pretrained(base, ...).get_base_model()) and patch that, "
            "or use lora_rank for LoRA beside"
        )


def note_other_adapters(model: nn.Module, config: SparseConfig, base_shape: dict[str, Any]) -> dict[str, Any]:
    """Note in a new adapter what other PEFT layers it is made over, and warn where an old one misses them."""
    kinds = sorted({class_name(layer).split(".")[2] for layer in other_layers(model)})
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


def refuse_training_around(module: nn.Module, args: Any) -> None:
    """Refuse to train what PEFT wraps around a patched model later, as a pre-hook of its first attention module.

    Raises:
        ValueError: another PEFT adapter is trained around sparse attention in use. It would be saved as an adapter of
            its own method, from which PEFT drops the rest when it loads.
    """
    attention: Any = getattr(module, CHILD)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not attention.is_active:
        return
    model = attention.model_switch.model()
    if layer := next((m for m in other_layers(model) if any(p.requires_grad for p in m.parameters())), None):
        raise ValueError(
            f"a PEFT adapter ({class_name(layer)}) is trained around sparse attention, and would be loaded without "
            "it: use lora_rank of the configuration, or train the other adapter first, merge_and_unload() it, and patch"
        )


def active_beside(module: nn.Module, attention: SparseAttentionLayer) -> list[str] | None:
    """Find the active adapter of another type in the same attention module, where transformers manages both.

    Its `load_adapter` leaves two adapters of two types on, and reports one as active: that of the linear layers.
    """
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer) and layer is not attention and layer.active_adapters:
            return None if attention.active in layer.active_adapters else list(layer.active_adapters)
    return None
