"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

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


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "triton" or (error.name or "").startswith("triton."):
            pytest.skip("Triton kernels need Triton, which comes with a GPU build of torch")
        raise
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed (see the captured output)"
