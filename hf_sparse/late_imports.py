"""Import names of a package when they are first asked for, so that its light modules do not wait for torch."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def late_imports(package: str, module: str, names: Iterable[str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package (PEP 562) for names that one of its modules defines.

    Args:
        package: the `__name__` of the package.
        module: the long name of the module, which is imported with the first of the names.
        names: the names.
    """
    known = frozenset(names)

    def get_late_name(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module), name)

    return get_late_name
