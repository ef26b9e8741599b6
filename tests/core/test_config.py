"""Check what adapters promise of configurations, and that an attached one is read-only."""

import copy
import pickle
from dataclasses import dataclass, fields, replace

import pytest
from peft import get_peft_model

from hf_sparse import SparsefinderConfig, SparseKConfig, patch
from hf_sparse.core.adapter_settings import LAST_FIELDS
from hf_sparse.core.config import FILLED_IN, SparseConfig
from hf_sparse.core.overrides import override
from hf_sparse.core.registry import registered_methods
from hf_sparse.patches import sparse_layers

OF_PEFT = ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"]
SHARED = {
    "inference_mode": False,
    "modules_to_save": None,
    "lora_rank": 0,
    "lora_alpha": None,
    "saves_embeddings": False,
}
LAST = {"layers": None, "target_modules": None, "base_shape": None}

# The fields of published adapters: names, order and defaults stay.
SPARSEK = {
    "k": 188,
    "window": 64,
    "sinks": 4,
    "scorer": "linear",
    "scorer_hidden_size": 128,
    "position_slope": 0.0,
    "learn_slope": True,
    "layer_shares": None,
    "support": 4,
    "head_shares": None,
    "pin_prompt": 0,
    "slope_length": None,
}
SPARSEFINDER = {
    "alpha": 1.5,
    "learn_alpha": False,
    "initial_scale": 0.3,
    "rank": 4,
    "shared_projection": False,
    "predictor": "clustering",
    "clusters": 16,
    "top_clusters": 2,
    "cluster_parts": 1,
    "balanced": False,
    "bin_kind": "shared",
    "bins": 16,
    "bin_width": 16,
    "threshold": 1.0,
    "tile": 64,
    "query_tile": None,
    "sparsity": 0.8,
    "length": 1024,
    "tiles_per_query": None,
    "window": 64,
    "global_tokens": 1,
    "profile": True,
    "head_budgets": False,
    "complete": False,
    "per_group": False,
    "entmax_native": None,
    "pool": 16,
    "exact_up_to": 8192,
    "choices": 4,
}
CONFIGS = [(SparseKConfig, SPARSEK), (SparsefinderConfig, SPARSEFINDER)]
KINDS = [kind for kind, _ in CONFIGS]
EXAMPLES = [(SparseKConfig, {"k": 8}), (SparsefinderConfig, {"tile": 8})]


@pytest.mark.parametrize("kind, own", CONFIGS)
def test_fields_their_order_and_their_defaults(kind, own):
    expected = [*OF_PEFT, *SHARED, *own, *LAST]
    assert [f.name for f in fields(kind)] == expected
    written = kind().to_dict()
    assert list(written) == expected
    assert {name: written[name] for name in (*SHARED, *own, *LAST)} == {**SHARED, **own, **LAST}


def test_every_registered_configuration_ends_with_the_shared_fields():
    for method in registered_methods().values():
        assert [f.name for f in fields(method.config)][-3:] == list(LAST_FIELDS) == list(LAST)


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_is_writable_until_it_is_attached(kind):
    config = kind()
    config.window = 32
    assert config.window == 32 and not config.is_attached


@pytest.mark.parametrize("attach", [patch, get_peft_model])
@pytest.mark.parametrize("kind, settings", EXAMPLES)
def test_attached_configurations_are_read_only_and_the_callers_stays_as_it_was(tiny_llama, kind, settings, attach):
    config = kind(**settings)
    before = config.to_dict()
    layers = sparse_layers(attach(tiny_llama(), config))
    attached = layers[0].config
    assert attached is not config and all(layer.config is attached for layer in layers)
    config.window = before["window"]  # the caller's own can be changed, and used again
    assert {**config.to_dict(), "base_model_name_or_path": None, "revision": None} == before
    assert config.base_shape is None and attached.base_shape is not None
    for name in [f.name for f in fields(kind) if f.name not in FILLED_IN]:
        with pytest.raises(AttributeError, match=rf"{kind.__name__}\.{name} is read-only.*new adapter.*override"):
            setattr(attached, name, getattr(attached, name))


def test_peft_may_fill_in_its_own_fields(tiny_llama):
    config = sparse_layers(get_peft_model(tiny_llama(), SparseKConfig(k=8)))[0].config
    for name in FILLED_IN:
        setattr(config, name, getattr(config, name))
    config.inference_mode = True
    assert config.inference_mode


def test_override_changes_an_attached_configuration_for_a_block(tiny_llama):
    config = sparse_layers(patch(tiny_llama(), SparseKConfig(k=8)))[0].config
    with override([config], k=4, window=2):
        assert (config.k, config.window) == (4, 2)
        with pytest.raises(AttributeError, match="read-only"):
            config.k = 3
    assert (config.k, config.window) == (8, 64)


def test_copies_stay_read_only_and_replace_makes_a_new_one(tiny_llama):
    config = sparse_layers(patch(tiny_llama(), SparseKConfig(k=8)))[0].config
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        with pytest.raises(AttributeError, match="read-only"):
            same.k = 3
    new = replace(config, k=3)
    new.k = 4
    assert (new.k, config.k) == (4, 8)


def test_one_configuration_serves_for_two_models(tiny_llama):
    config = SparseKConfig(k=8)
    first, second = get_peft_model(tiny_llama(), config), get_peft_model(tiny_llama(num_hidden_layers=3), config)
    assert len(sparse_layers(first)) == 2 and len(sparse_layers(second)) == 3


def test_two_adapters_of_one_configuration_are_apart(tiny_llama):
    model, config = get_peft_model(tiny_llama(), SparseKConfig(k=8)), SparseKConfig(k=4)
    model.add_adapter("other", config)
    assert model.peft_config["other"] is sparse_layers(model)[0].configs["other"] is not config
    assert config.base_shape is None and model.peft_config["other"].is_attached


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_rank": -1}, "lora_rank must be an integer of at least 0, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be None or a number above 0, got 0"),
        ({"modules_to_save": "score"}, "modules_to_save must be None or a list of names of modules, got 'score'"),
        ({"saves_embeddings": 1}, "saves_embeddings must be True or False, got 1"),
        ({"base_shape": 3}, "base_shape must be None or an object, got 3"),
        ({"target_modules": 3}, "target_modules must be None, a name or names, got 3"),
        ({"layers": [-1]}, r"layers must be None or a list of indices of layers, got \[-1\]"),
    ],
)
def test_bad_values_of_shared_fields_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{message}"):
        kind(**settings)


def test_a_method_without_the_shared_fields_is_no_method():
    @dataclass
    class Incomplete(SparseConfig):
        k: int = 1

    method = replace(registered_methods()["HF_SPARSE_SPARSEK"], peft_type="HF_SPARSE_OTHER", config=Incomplete)
    from hf_sparse.core.registry import add_method

    with pytest.raises(TypeError, match="Incomplete must end with the fields layers, target_modules, base_shape"):
        add_method(method)
    assert "HF_SPARSE_OTHER" not in registered_methods()
