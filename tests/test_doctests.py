"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import hf_sparse
import hf_sparse.finetune
import hf_sparse.patches


def modules() -> list[str]:
    # Each package by its own path: an editable install does not list the two outer folders under hf_sparse.__path__.
    packages = (hf_sparse, hf_sparse.patches, hf_sparse.finetune)
    found = {p.__name__ for p in packages}
    for package in packages:
        found |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    return sorted(name for name in found if not name.endswith(".__main__"))


def source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text("utf-8")


@pytest.mark.parametrize("name", [name for name in modules() if ">>> " in source(name)])
def test_doctests(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted, f"{name} has no example, though it has a line with a prompt"
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed (see the captured output)"
