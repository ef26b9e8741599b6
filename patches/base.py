"""Describe model families: the class of their attention modules, and how to read sizes off them."""

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.core.layer import AttentionShape
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.patches.unsupported import REASONS


def _hidden_size(module: Any) -> int:
    return module.q_proj.in_features


def _num_key_value_heads(module: Any) -> int:
    return module.config.num_key_value_heads


def _is_causal(module: Any) -> bool:
    return getattr(module, "is_causal", True)


def _has_sliding_window(module: Any) -> bool:
    return getattr(module, "sliding_window", None) is not None


def _num_attention_heads(module: Any) -> int:
    return module.config.num_attention_heads


def _head_dim(module: Any) -> int:
    names = ("head_dim", "attention_head_size", "head_size")  # transformers' names for it
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _no_refusal(model: Any) -> str | None:
    return None


def _backbone(model: Any) -> Any:
    return model.base_model


@dataclass(frozen=True)
class Family:
    """Describe one model family.

    Attributes:
        model_types: the `config.model_type` values it covers.
        attention: `"module:Class"` of its attention modules; a name, so that importing a family imports no model.
        hidden_size: reads the size of the attention module's input off the module.
        num_key_value_heads: reads the number of KV heads off an attention module.
        num_attention_heads: reads the number of query heads off an attention module.
        head_dim: reads the size of one head off an attention module.
        causal: whether the queries of an attention module see no later keys.
        is_local: whether an attention module attends within a sliding window of its own; it is left as it is.
        refusal: why this particular model cannot be patched, or `None`.
        backbone: finds the module of a model that takes its tokens and returns hidden states; a head calls it.
    """

    model_types: tuple[str, ...]
    attention: str
    hidden_size: Callable[[Any], int] = _hidden_size
    num_key_value_heads: Callable[[Any], int] = _num_key_value_heads
    num_attention_heads: Callable[[Any], int] = _num_attention_heads
    head_dim: Callable[[Any], int] = _head_dim
    causal: Callable[[Any], bool] = _is_causal
    is_local: Callable[[Any], bool] = _has_sliding_window
    refusal: Callable[[Any], str | None] = _no_refusal
    backbone: Callable[[Any], Any] = _backbone

    def modules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield name and module of every self-attention layer, local ones included; the n-th is layer n."""
        kind = pkgutil.resolve_name(self.attention)
        for name, module in model.named_modules():
            if isinstance(module, kind) and not getattr(module, "is_cross_attention", False):
                yield name, module

    def shape_of(self, module: nn.Module, layer: int) -> AttentionShape:
        """Describe an attention module as a method sees it."""
        return AttentionShape(
            hidden_size=self.hidden_size(module),
            num_attention_heads=self.num_attention_heads(module),
            num_key_value_heads=self.num_key_value_heads(module),
            head_dim=self.head_dim(module),
            layer=layer,
            causal=self.causal(module),
        )


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family.

    Raises:
        ValueError: another family has one of its model types.
    """
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise ValueError(f"model type {model_type!r} is registered already")
        _FAMILIES[model_type] = family
    return family


def supported_model_types() -> list[str]:
    """Return the values of `config.model_type` that have a family, sorted."""
    return sorted(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedModelError: not a transformers model, or a family without a patch.
    """
    if not isinstance(model, PreTrainedModel):
        wraps = hasattr(model, "get_base_model")
        advice = (
            " (merge its adapter first: merge_and_unload(), or unload() to drop it, returns the base model; over a "
            "LoRA that is loaded frozen, patch what its get_base_model() returns)"
        )
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}" + (advice if wraps else "")
        )
    return check_model_type(model.config.model_type)


def check_model_type(model_type: str) -> Family:
    """Return the family of a type of models.

    Raises:
        UnsupportedModelError: a family without a patch; says why if that is known, and lists those with one.
    """
    if model_type not in _FAMILIES:
        reason = f" ({REASONS[model_type]})" if model_type in REASONS else ""
        raise UnsupportedModelError(
            f"no sparse attention patch for model type {model_type!r}{reason}; supported: "
            f"{', '.join(supported_model_types())}"
        )
    return _FAMILIES[model_type]
