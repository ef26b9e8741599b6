"""Import the sparse attention methods, each in one folder.

A folder NAME has a module `settings`, which describes the method and imports no torch, and a module `method`, which
registers it. Other packages bring methods by entry points of the group `hf_sparse.methods`, whose values are the names
of such folders.
"""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

#: The method of `hf-sparse patch` without `--method`.
DEFAULT = "sparsek"


def folders() -> list[str]:
    """Return the long names of the packages of the methods in order: those here, then those of other packages.

    >>> folders()[:2]
    ['hf_sparse.methods.sparsefinder', 'hf_sparse.methods.sparsek']
    """
    names = [f"{__name__}.{module.name}" for module in iter_modules(__path__) if module.ispkg]
    return names + sorted(entry.value for entry in entry_points(group=__name__))


def register_all() -> None:
    """Register the method of every folder with PEFT."""
    for folder in folders():
        import_module(f"{folder}.method")
