"""The tables have all methods of the package, and say of each only what is true."""

import pytest

from hf_sparse.core.registry import registered_methods

pytestmark = pytest.mark.versions


def test_every_method_has_an_entry(methods):
    package = {
        method.name for method in registered_methods().values() if method.layer.__module__.startswith("hf_sparse.")
    }
    assert {method.name for method in methods.values()} == package


def test_every_refusal_is_asked_for(methods):
    """A misspelt key would be a promise that no test checks."""
    columns = {"crop", "assisted", "lookup", "static cache", "static cache of some layers"}
    assert {name for method in methods.values() for name in method.refusals} <= columns
