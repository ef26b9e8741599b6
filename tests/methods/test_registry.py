"""The list of methods that the layers above go through."""

from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

from hf_sparse import SparsefinderConfig, SparseKConfig, methods
from hf_sparse.core.layer import AttentionShape
from hf_sparse.core.registry import method_of, registered_methods
from hf_sparse.tuner import register_method

METHODS = registered_methods()


def test_both_methods_are_there():
    assert {name: method.config for name, method in METHODS.items()} == {
        "HF_SPARSE_SPARSEK": SparseKConfig,
        "HF_SPARSE_SPARSEFINDER": SparsefinderConfig,
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_its_configuration_and_says_what_the_layers_above_ask(name):
    method = METHODS[name]
    config = method.config()
    assert method_of(config) is method
    assert config.peft_type == name
    shape = AttentionShape(32, 4, 2, 8, layer=3)
    kind = method.layer
    assert isinstance(kind.label, str) and set(kind.shape_fields) <= set(vars(shape))
    module = kind.for_shape(shape)
    assert isinstance(module, kind) and (module.layer, module.causal) == (3, True) and module.configs == {}
    module.add_adapter("default", config)
    assert module.config is config
    assert type(module.cache_layer()) is kind.cache_layer_type
    assert all(parameter.startswith(method.prefix) for parameter, _ in module.named_parameters())
    assert not kind.for_shape(AttentionShape(32, 4, 4, 8, layer=0, causal=False)).causal


def test_other_configurations_are_refused():
    with pytest.raises(TypeError, match="expected a SparsefinderConfig or a SparseKConfig, got dict"):
        method_of({})


def test_a_name_is_registered_once():
    method = METHODS["HF_SPARSE_SPARSEK"]
    assert register_method(method) is method
    with pytest.raises(ValueError, match="a method 'HF_SPARSE_SPARSEK' is registered already"):
        register_method(replace(method, name="other"))
    others = {"name": "other", "peft_type": "OTHER", "prefix": "other_"}
    for field in ("name", "prefix"):
        taken = {**others, field: getattr(method, field)}
        with pytest.raises(ValueError, match=f"a method '{getattr(method, field)}' is registered already"):
            register_method(replace(method, **taken))
    assert registered_methods() == METHODS


@pytest.mark.parametrize("module", ["settings", "method"])
def test_a_method_of_another_package_that_cannot_be_imported_is_left_out(monkeypatch, module):
    entry = EntryPoint("broken", "no_such_package.window", "hf_sparse.methods")
    monkeypatch.setattr(methods, "entry_points", lambda group: [entry])
    message = (
        rf"the method 'broken' of the package no_such_package is left out: no_such_package\.window\.{module} cannot"
    )
    with pytest.warns(UserWarning, match=message):
        found = methods.import_from_each(module)
    assert [one.__name__ for one in found] == [
        f"hf_sparse.methods.{name}.{module}" for name in ("sparsefinder", "sparsek")
    ]
    assert registered_methods() == METHODS
