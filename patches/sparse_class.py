"""Give an attention module a class whose forward tells the attention function of sparse attention.

The class derives from that of the module and has its name. Its forward adds one keyword, `sparse_call`, which
transformers carries to the attention function, and calls the model's own forward, which stays as it is. A forward
pre-hook does the same, but torch calls a module that has hooks by a longer way, which takes several per cent of the
time that a layer needs for a short text. It is for modules whose class cannot be another.
"""

import functools
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from hf_sparse.patches.interface import before_attention, sparse_call


@functools.cache
def sparse_class(kind: Any) -> Any:
    """Return the subclass of a class of attention modules that attends sparsely where a method is attached."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = sparse_call(self, args, kwargs)
        if call is None:
            return kind.forward(self, *args, **kwargs)
        return kind.forward(self, *args, **kwargs, sparse_call=call)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        if type(self) is not derived:  # a class that others derived from this one
            return super(derived, self).__reduce_ex__(protocol)
        return _empty, (kind,), self.__getstate__()

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, "__reduce_ex__": reduce, "model_class": kind}
    derived: Any = type(kind.__name__, (kind,), names | own)
    return derived


def set_sparse_class(module: nn.Module) -> RemovableHandle | None:
    """Let an attention module attend sparsely where a method is attached to it.

    Returns:
        The handle of a hook where the module has a forward of its own, as accelerate sets it for models on several
        devices, or parametrizations, which torch takes out of the class that has them; elsewhere `None`.
    """
    if "forward" in vars(module) or is_parametrized(module):
        return module.register_forward_pre_hook(before_attention, with_kwargs=True)
    if not hasattr(module, "model_class"):
        kind: Any = type(module)
        module.__class__ = sparse_class(kind)
    return None


def restore_class(module: nn.Module) -> None:
    """Give an attention module the class back that it had; one that others derived from ours since stays."""
    kind: Any = type(module)
    if "model_class" in vars(kind):
        module.__class__ = kind.model_class


def _empty(kind: Any) -> nn.Module:
    """Make a module of the subclass for a copy, or for a pickle, which set its attributes."""
    module: nn.Module = object.__new__(sparse_class(kind))
    return module
