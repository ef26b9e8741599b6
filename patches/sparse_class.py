"""Give an attention module a class whose forward tells the attention function of sparse attention.

The class derives from that of the module and has its name. Its forward adds one keyword, `sparse_call`, which
transformers carries to the attention function, and calls the model's own forward, which stays as it is. A forward
pre-hook could do the same, but torch calls a module that has hooks by a longer way, which takes several per cent of the
time that a layer needs for a short text.
"""

import functools
from typing import Any

from torch import nn

from hf_sparse.patches.interface import sparse_call


@functools.cache
def sparse_class(kind: Any) -> Any:
    """Return the subclass of a class of attention modules that attends sparsely where a method is attached."""
    forward_of_model = kind.forward

    @functools.wraps(forward_of_model)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = sparse_call(self, args, kwargs)
        if call is None:
            return forward_of_model(self, *args, **kwargs)
        return forward_of_model(self, *args, **kwargs, sparse_call=call)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _empty, (kind,), self.__getstate__()

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, "__reduce_ex__": reduce, "model_class": kind}
    return type(kind.__name__, (kind,), names | own)


def set_sparse_class(module: nn.Module) -> None:
    """Let an attention module attend sparsely where a method is attached to it."""
    if not hasattr(module, "model_class"):
        kind: Any = type(module)
        module.__class__ = sparse_class(kind)


def restore_class(module: nn.Module) -> None:
    """Give an attention module the class back that it had; one that others derived from ours since stays."""
    kind: Any = type(module)
    if "model_class" in vars(kind):
        module.__class__ = kind.model_class


def _empty(kind: Any) -> nn.Module:
    """Make a module of the subclass for a copy, or for a pickle, which set its attributes."""
    module: nn.Module = object.__new__(sparse_class(kind))
    return module
