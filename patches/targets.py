"""Find the attention modules that a configuration is for, with everything checked before a model is changed."""

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.core.config import SparseConfig
from hf_sparse.core.layer import AttentionShape, SparseAttentionLayer
from hf_sparse.core.registry import method_of
from hf_sparse.errors import AdapterMismatchError, UnsupportedModelError
from hf_sparse.patches.attached import sparse_layers
from hf_sparse.patches.base import family_of
from hf_sparse.patches.lora import check_lora
from hf_sparse.patches.other_adapters import check_other_adapters, class_name, note_other_adapters, other_layers


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
    base_shape = note_other_adapters(model, config, _base_shape(model, shape, len(modules), kind, config))
    kind.check(config, shape, len(modules))
    if config.lora_rank:
        if layer := next(other_layers(model), None):
            raise ValueError(
                f"lora_rank must be 0 over another PEFT adapter ({class_name(layer)}), got {config.lora_rank}"
            )
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
    matches = [(end, name) for end in ends for name in patched if f".{name}".endswith(f".{end}")]
    if {end for end, _ in matches} != set(ends) or {name for _, name in matches} != set(patched):
        raise ValueError(
            f"{config.config_name}.target_modules is filled in when an adapter is attached, here with {patched[0]!r} "
            f"and its like, got {given!r}: leave it out, and choose layers with layers=[...]"
        )


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
