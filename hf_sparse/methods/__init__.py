"""Import the sparse attention methods, each in one folder.

A folder NAME has a module `settings`, which describes the method and imports no torch, and a module `method`, which
registers it. Other packages bring methods by entry points of the group `hf_sparse.methods`, whose values are the names
of such folders.
"""

import warnings
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from types import ModuleType

#: The method of `hf-sparse patch` without `--method`.
DEFAULT = "sparsek"


def import_from_each(name: str) -> list[ModuleType]:
    """Import a module of this name from the folder of every method: those here, then those of other packages.

    What cannot be imported of another package is left out with a warning, and the other methods work.

    >>> [module.SETTINGS.name for module in import_from_each("settings")][:2]
    ['sparsefinder', 'sparsek']
    """
    modules = [import_module(f"{__name__}.{folder.name}.{name}") for folder in iter_modules(__path__) if folder.ispkg]
    for entry in sorted(entry_points(group=__name__), key=lambda entry: entry.value):
        try:
            modules.append(import_module(f"{entry.value}.{name}"))
        except Exception as error:
            warnings.warn(
                f"the method {entry.name!r} of the package {_package(entry)} is left out: {entry.value}.{name} cannot "
                f"be imported ({type(error).__name__}: {error})",
                stacklevel=2,
            )
    return modules


def _package(entry: EntryPoint) -> str:
    """Return the name of the package that brings an entry point, as pip knows it."""
    return entry.dist.name if entry.dist else entry.value.partition(".")[0]


def register_all() -> None:
    """Register the method of every folder with PEFT."""
    import_from_each("method")
