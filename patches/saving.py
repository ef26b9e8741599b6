"""Save a patched model as a full model: a checkpoint of transformers with the adapter inside.

`hf_sparse.adapters.full_model` says what a full model is, and reads it.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_sparse.core.config import SparseConfig
from hf_sparse.patches.attached import sparse_layers
from hf_sparse.patches.other_adapters import class_name, other_layers

#: The key of a config.json, and the prefix of tensors, under which a full model keeps an adapter beside its weights.
INSIDE = "hf_sparse"


def save_patched_model(model: Any, *args: Any, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any) -> None:
    """Save a patched model with `save_pretrained` of its class, the adapter inside.

    Weights of the base model are saved as they are now, trained or not.

    Args:
        model: the patched model, which no `PeftModel` holds.
        *args, **kwargs: for `save_pretrained`.
        state_dict: tensors of the model by their names there; by default those that it has.

    Raises:
        ValueError: there are several adapters, of which a full model holds one; or PEFT layers of another method, whose
            weights transformers would not find in it; or the base model is quantised, or a `variant` was asked for.
    """
    _check_that_it_loads(model, kwargs.get("variant"))
    if other := next(other_layers(model), None):
        raise ValueError(
            "expected no other PEFT adapter in a model that is saved with its sparse attention, got "
            f"{class_name(other)}: merge that one first (merge_and_unload), or use peft.get_peft_model in the place of "
            "hf_sparse.patch, which saves each by itself"
        )
    configs = {name: config for layer in sparse_layers(model) for name, config in layer.configs.items()}
    if len(configs) > 1:
        raise ValueError(
            f"expected one adapter to save with the model, got {', '.join(sorted(configs))}: unpatch it and patch it "
            "again with the one to keep"
        )
    ((adapter, config),) = configs.items()
    inside = _checkpoint_names(model, adapter)
    state = model.state_dict() if state_dict is None else state_dict
    state = {inside.get(name, name): tensor for name, tensor in state.items()}
    setattr(model.config, INSIDE, {"form": "full", "adapter": _content(config)})
    try:
        type(model).save_pretrained(model, *args, state_dict=state, **kwargs)
    finally:
        delattr(model.config, INSIDE)


def is_in_peft_model(model: Any) -> bool:
    """Tell whether a `PeftModel` holds the adapters of a patched model, and saves them."""
    held = getattr(model, "peft_config", {}).values()
    return any(config is other for layer in sparse_layers(model) for config in layer.configs.values() for other in held)


def names_in_model(model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the tensors of a checkpoint that `save_patched_model` wrote the names that they have in the model.

    Whatever is under another name keeps it; a state dict of the model itself is returned as it is.
    """
    if not any(name.startswith(f"{INSIDE}.") for name in state):
        return state  # with torch's metadata
    back = {inside: name for name, inside in _checkpoint_names(model, _adapter_in_use(model)).items()}
    return {back.get(name, name): value for name, value in state.items()}


def _check_that_it_loads(model: Any, variant: str | None) -> None:
    """Raise `ValueError` where transformers would write what `hf_sparse.from_pretrained` does not load."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "expected a base model that is not quantised in a model that is saved with its sparse attention, got "
            f"{type(model.hf_quantizer).__name__}, which names tensors itself and would lose the adapter's: use "
            "peft.get_peft_model in the place of hf_sparse.patch, which saves the adapter"
        )
    if variant is not None:
        raise ValueError(
            f"expected no variant of a model that is saved with its sparse attention, got {variant!r}, whose file "
            "hf_sparse.from_pretrained would not find"
        )


def _adapter_in_use(model: Any) -> str:
    """Return the name of the only adapter, or of the one in use of several; an empty one without adapters."""
    layers = sparse_layers(model)
    names = {name for layer in layers for name in layer.configs}
    return names.pop() if len(names) == 1 else next((name for layer in layers for name in layer.active_adapters), "")


def _checkpoint_names(model: Any, adapter: str) -> dict[str, str]:
    """Name what an adapter holds in each layer: under its name in the model, that in a full model."""
    layers = set(sparse_layers(model))
    names = {}
    for place, layer in model.named_modules():
        for container in layer.adapter_layer_names if layer in layers else ():
            learned = getattr(layer, container)
            for key in learned[adapter].state_dict() if adapter in learned else ():
                names[f"{place}.{container}.{adapter}.{key}"] = f"{INSIDE}.{place}.{container}.{key}"
    return names


def _content(config: SparseConfig) -> dict[str, Any]:
    """Return the fields of a configuration as they stand in an adapter_config.json."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))  # sets
