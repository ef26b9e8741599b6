"""The methods there are. Each registers itself in its package's `__init__`; the layers above go through this list."""

from dataclasses import dataclass
from typing import Any

from hf_sparse.methods.base import SparseMethod


@dataclass(frozen=True)
class Method:
    """One sparse attention method.

    Attributes:
        peft_type: its name in PEFT and in an `adapter_config.json`, such as `"HF_SPARSE_SPARSEK"`.
        config: the class of its configurations, a `PeftConfig`.
        attention: what is attached to an attention module.
        prefix: how the names of its learned containers begin, different from those of all other methods of PEFT.
    """

    peft_type: str
    config: type
    attention: type[SparseMethod]
    prefix: str


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Add a method.

    Raises:
        ValueError: another one has this name.
    """
    if _METHODS.setdefault(method.peft_type, method) != method:
        raise ValueError(f"a method {method.peft_type!r} is registered already")
    return method


def registered_methods() -> dict[str, Method]:
    """All methods by their name in PEFT."""
    return dict(_METHODS)


def method_of(config: Any) -> Method:
    """The method that a configuration is for.

    Raises:
        TypeError: it is for none of them.
    """
    for method in _METHODS.values():
        if isinstance(config, method.config):
            return method
    known = " or a ".join(method.config.__name__ for method in _METHODS.values())
    raise TypeError(f"expected a {known}, got {type(config).__name__}")
