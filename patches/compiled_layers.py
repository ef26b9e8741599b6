"""Compile one decoder layer, and take the steps of all layers of a model through it.

`torch.compile` follows the Python of every decoder layer of a model, which takes it most of a second for each. But the
layers of a decoder differ in nothing but their tensors. So what is compiled is a copy of one layer, and before each
layer of a step the copy is given the tensors of that layer.
"""

import copy
import os
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache, cached_property, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config
from transformers.cache_utils import Cache

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.ops.triton import installed
from hf_sparse.patches.base import family_of
from hf_sparse.patches.lora import copy_lora
from hf_sparse.patches.recorded_steps import calls_nothing_else
from hf_sparse.patches.shared_products import SHARE_PRODUCTS

_NUMBERS = ("layer_idx", "layer")  # attributes that say which layer it is; a step asks for its cache layer with them
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
# Attributes that every module has, and the hooks of sparse attention: the first layer has one that only training needs.
_LEFT_OUT = frozenset((*vars(nn.Module()), "hooks"))
_SECONDS = 30  # that a fork waits for imports, which take a few
_MOST_COPIES = 4  # of different layers; torch compiles a forward eight times at most


def compiled_layers(model: Any) -> "CompiledLayers | None":
    """Return what takes compiled steps of a model; `None` where its layers cannot share what is compiled of one.

    So it is if one of them is dense, as layers with a window of their own are, for its cache layer cannot be lent, if
    the steps of a method differ between layers, if hooks of others are to be called, or if many layers differ.
    """
    attentions = [getattr(module, "sparse_attention", None) for _, module in family_of(model).modules(model)]
    if not calls_nothing_else(model) or not all(
        [attention is not None and attention.is_active and attention.steps_are_alike for attention in attentions]
    ):
        return None
    layers = CompiledLayers(model)
    if len(layers.copies) > _MOST_COPIES:
        return None
    importing()
    return layers


@cache
def importing() -> threading.Thread:
    """Import on another thread what `torch.compile` asks for, some hundred modules that take Python seconds.

    Nothing of it is needed before the first step, and while a first prompt waits for its kernels Python has time.
    """
    if installed():
        import_module("triton")  # which a prompt imports too: not in two threads

    def work() -> None:
        with suppress(Exception):  # as when the process ends meanwhile; who needs it imports it again, and is told
            import_module("torch._inductor.compile_fx")

    thread = threading.Thread(target=work)
    thread.start()
    if hasattr(os, "register_at_fork"):  # in a child nothing could import what this thread was importing
        # Not for ever: what forks may be an import for which this thread waits.
        os.register_at_fork(before=lambda: None if thread is threading.current_thread() else thread.join(_SECONDS))
    return thread


class CompiledLayers:
    """Take steps of one token, without gradients, in which the decoder layers of a model are compiled.

    Args:
        model: a patched model. Adapters that are added or switched on later are not known here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copies: dict[Hashable, _Copy] = {}
        self.layers: list[tuple[nn.Module, Callable[..., Any]]] = []
        for name, module in list(model.named_modules()):
            if isinstance(getattr(module, "sparse_attention", None), SparseAttentionLayer):
                layer = model.get_submodule(name.rpartition(".")[0])
                kind = _kind(layer)
                if kind not in self.copies:
                    self.copies[kind] = _Copy(layer)
                self.layers.append((layer, partial(self.copies[kind], layer, module)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the forward of the model returns; the layers of its cache do not count the token."""
        try:
            for layer, run in self.layers:
                layer.forward = run
            return self.model(*args, **kwargs)
        finally:
            for layer, _ in self.layers:
                vars(layer).pop("forward", None)


class _Copy:
    """Hold the copy of a decoder layer, with modules of its own and hooks of the same effect, to run any like it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = _copy_modules(layer)
        module: Any = next(module for module in self.layer.modules() if hasattr(module, "sparse_attention"))
        self.attention, self.number = module.sparse_attention, int(module.layer_idx)
        copy_lora(module, self.attention)

    @cached_property
    def forward(self) -> Callable[..., Any]:
        """Return the compiled forward of the layer, which gets the layer as its first argument."""
        importing().join()
        return compiled(type(self.layer).forward)

    def __call__(self, layer: nn.Module, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a layer, whose attention module is `module`; see the forward of the layer for what else it takes."""
        for empty, full in zip(self.layer.modules(), layer.modules(), strict=True):
            vars(empty).update(_parameters=full._parameters, _buffers=full._buffers)

        def lend(value: Any) -> Any:
            if not isinstance(value, Cache):
                return value
            given: Any = value.layers[module.layer_idx]
            module.sparse_attention.check_cache(given)
            return Cache(layers=[given.lent_to(self.attention)] * (self.number + 1))

        args, kwargs = tuple([lend(value) for value in args]), {name: lend(value) for name, value in kwargs.items()}
        return self.forward(self.layer, *args, **kwargs)


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a class compiled, with products of one input in one kernel.

    torch finds by the code of the forward what it has compiled of it before. A pass that the user has set stays alone.
    """
    if config.post_grad_custom_pre_pass is not None:
        return torch.compile(forward, dynamic=False)
    return torch.compile(forward, dynamic=False, options={"post_grad_custom_pre_pass": SHARE_PRODUCTS})


def _copy_modules(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    vars(copied)["_modules"] = {
        name: None if child is None else _copy_modules(child) for name, child in module._modules.items()
    }
    return copied


def _kind(layer: nn.Module) -> Hashable:
    """Return what two layers must share to run through one copy: all but the contents of tensors and their numbers."""
    return tuple([(name, type(module), _settings(module), _shapes(module)) for name, module in layer.named_modules()])


def _settings(module: nn.Module) -> Hashable:
    """Return the attributes of a module: plain values by what they are, others must be one and the same object.

    Of the others, those of sparse attention are left out: its `steps_are_alike` answers for them.
    """
    settings = {name: value for name, value in vars(module).items() if name not in (*_NUMBERS, *_LEFT_OUT)}
    is_ours = isinstance(module, SparseAttentionLayer)
    plain = [(name, repr(value)) for name, value in settings.items() if _is_plain(value)]
    others = [(name, _identity(value)) for name, value in settings.items() if not _is_plain(value) and not is_ours]
    return tuple(plain), tuple(others)


def _identity(value: Any) -> Hashable:
    """Return what tells an object from others; functions with the same fixed arguments are one."""
    return (id(value.func), repr(value.args), repr(value.keywords)) if isinstance(value, partial) else id(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _shapes(module: nn.Module) -> Hashable:
    """Return names, shapes, dtypes and alignment of the tensors of a module; compiled code depends on all of them."""
    tensors: list[tuple[str, Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
    return tuple(
        [
            (name, tensor is not None and (tensor.shape, tensor.dtype, tensor.data_ptr() % 16))
            for name, tensor in tensors
        ]
    )
