"""Import the sparse attention methods, each in one folder.

A folder NAME has a module `settings`, which describes the method and imports no torch, and a module `method`, which
registers it.
"""

from importlib import import_module
from pkgutil import iter_modules

#: The method of `hf-sparse patch` without `--method`.
DEFAULT = "sparsek"


def folders() -> list[str]:
    """Return the long names of the packages of the methods, in order.

    >>> folders()
    ['hf_sparse.methods.sparsefinder', 'hf_sparse.methods.sparsek']
    """
    return [f"{__name__}.{module.name}" for module in iter_modules(__path__) if module.ispkg]


def register_all() -> None:
    """Register every method that has a folder here with PEFT."""
    for folder in folders():
        import_module(f"{folder}.method")
