"""Compile one decoder layer for all: in compiled decoding steps the layers of a model are regions of one kind.

The layers of a decoder differ in their weights and caches only, and those are inputs of a compiled graph. Marked by
`torch.compiler.nested_compile_region`, the first layer is lowered, and the others call what was made of it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_sparse.core.layer import SparseAttentionLayer


def mark_layers(model: nn.Module) -> None:
    """Make regions of the decoder layers of a model whose attention is sparse; other forwards are as before."""
    for layer, attention in _decoder_layers(model):
        if "forward" not in vars(layer):  # others, such as accelerate, replace it too
            layer.forward = partial(_forward, layer, attention)


def unmark_layers(model: nn.Module) -> None:
    """Take back `mark_layers`."""
    for layer in model.modules():
        if is_marked(layer):
            del layer.forward


def is_marked(layer: nn.Module) -> bool:
    """Tell whether the forward of a module is the one that `mark_layers` put there."""
    forward: Any = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _decoder_layers(model: nn.Module) -> Iterator[tuple[nn.Module, SparseAttentionLayer]]:
    """Yield the modules that hold an attention module, and its sparse attention."""
    for name, module in list(model.named_modules()):
        attention = getattr(module, "sparse_attention", None)
        if isinstance(attention, SparseAttentionLayer):
            yield model.get_submodule(name.rpartition(".")[0]), attention


def _forward(layer: nn.Module, attention: SparseAttentionLayer, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer, as a region in a decoding step that is being compiled."""
    is_step = torch.compiler.is_compiling() and not torch.is_grad_enabled() and hidden_states.shape[1] == 1
    if is_step and attention.is_active and attention.compiles_as_region:
        return _region(layer, hidden_states, *args, **kwargs)
    return type(layer).forward(layer, hidden_states, *args, **kwargs)


@torch.compiler.nested_compile_region
def _region(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer; what is compiled for one is used for the others."""
    return type(layer).forward(layer, *args, **kwargs)
