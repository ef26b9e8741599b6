"""What a model family tells: where its attention modules are and what they look like."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_types: the `config.model_type` values it covers.
        attention: returns the class of its attention modules; called late, so that importing a family imports no
            model.
        num_key_value_heads: reads the number of KV heads off an attention module.
        hidden_size: reads the size of the attention module's input off the module.
    """

    model_types: tuple[str, ...]
    attention: Callable[[], type[nn.Module]]
    hidden_size: Callable[[Any], int]
    num_key_value_heads: Callable[[Any], int]

    def modules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of every attention layer, in the order of the layers."""
        kind = self.attention()
        for name, module in model.named_modules():
            if isinstance(module, kind):
                yield name, module


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family; two families must not claim one model type."""
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise ValueError(f"model type {model_type!r} is registered already")
        _FAMILIES[model_type] = family
    return family


def supported_model_types() -> list[str]:
    return sorted(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: not a transformers model, or a family without a patch; lists those with one.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}"
            + (" (unwrap it: pass the base model)" if hasattr(model, "get_base_model") else "")
        )
    model_type = model.config.model_type
    if model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"no sparse attention patch for model type {model_type!r}; supported: {', '.join(supported_model_types())}"
        )
    return _FAMILIES[model_type]
