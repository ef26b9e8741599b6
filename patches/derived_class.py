"""Give a module a class that derives from its own, has its name and another forward, and goes with the patch."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


def derived_class(kind: Any, forward: Callable[..., Any], make: Callable[[Any], Any]) -> Any:
    """Return a subclass of a class of modules.

    Args:
        kind: the class.
        forward: in place of that of the class.
        make: a function that returns this subclass for the class; a copy or a pickle of a module calls it by name.
    """

    def reduce(self: nn.Module, protocol: Any) -> Any:
        if type(self) is not derived:  # a class that others derived from this one
            return super(derived, self).__reduce_ex__(protocol)
        return _empty, (make, kind), self.__getstate__()

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, "__reduce_ex__": reduce, "unpatched_class": kind}
    derived: Any = type(kind.__name__, (kind,), names | own)
    return derived


def set_derived_class(module: nn.Module, make: Callable[[Any], Any]) -> bool:
    """Give a module the subclass of its class that `make` returns.

    Returns:
        False, with nothing changed, where the module has a forward of its own, as accelerate sets it for models on
        several devices, or parametrizations, which torch takes out of the class that has them.
    """
    if "forward" in vars(module) or is_parametrized(module):
        return False
    if not hasattr(module, "unpatched_class"):
        kind: Any = type(module)
        module.__class__ = make(kind)
    return True


def restore_class(module: nn.Module) -> None:
    """Give a module the class back that it had; one that others derived from ours since stays."""
    kind: Any = type(module)
    if "unpatched_class" in vars(kind):
        module.__class__ = kind.unpatched_class


def _empty(make: Callable[[Any], Any], kind: Any) -> nn.Module:
    """Make a module of the subclass for a copy, or for a pickle, which set its attributes."""
    module: nn.Module = object.__new__(make(kind))
    return module
