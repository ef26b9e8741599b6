import json

import pytest
from peft import PeftConfig

from hf_sparse import SparseKConfig


def test_defaults():
    config = SparseKConfig()
    assert (config.k, config.window, config.sinks, config.slots) == (124, 128, 4, 256)
    assert config.scorer == "linear" and config.position_slope == 0.0 and config.layers is None
    assert config.soft_support == 4 * 124


def test_support_is_counted_in_k():
    assert SparseKConfig(k=10, support=2).soft_support == 20
    assert SparseKConfig(k=10, support=None).soft_support is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k": 1, "window": 1, "sinks": 0, "scorer": "mlp", "scorer_hidden_size": 7},
        {"position_slope": 1e-3, "support": None, "layers": [3, 1, 1], "task_type": "CAUSAL_LM"},
        {"base_shape": {"model_type": "llama", "hidden_size": 32}, "target_modules": ["a", "b"], "revision": "v1"},
    ],
)
def test_json_round_trip(settings, tmp_path):
    config = SparseKConfig(**settings)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "HF_SPARSE_SPARSEK"
    for loaded in (SparseKConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SparseKConfig
        assert {**loaded.to_dict(), "inference_mode": False} == config.to_dict()


def test_layers_are_sorted_and_unique():
    assert SparseKConfig(layers=[3, 1, 3]).layers == [1, 3]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"k": 0}, "SparseKConfig.k must be an integer of at least 1, got 0"),
        ({"k": 1.5}, "SparseKConfig.k must be an integer of at least 1, got 1.5"),
        ({"k": True}, "SparseKConfig.k must be an integer of at least 1, got True"),
        ({"window": 0}, "SparseKConfig.window must be an integer of at least 1, got 0"),
        ({"sinks": -1}, "SparseKConfig.sinks must be an integer of at least 0, got -1"),
        ({"scorer_hidden_size": 0}, "SparseKConfig.scorer_hidden_size must be an integer of at least 1, got 0"),
        ({"support": 0}, "SparseKConfig.support must be None or an integer of at least 1, got 0"),
        ({"support": 2.5}, "SparseKConfig.support must be None or an integer of at least 1, got 2.5"),
        ({"scorer": "deep"}, "SparseKConfig.scorer must be 'linear' or 'mlp', got 'deep'"),
        ({"position_slope": "steep"}, "SparseKConfig.position_slope must be a number, got 'steep'"),
        ({"layers": []}, r"SparseKConfig.layers must be None or indices of layers, got \[\]"),
        ({"layers": [-1]}, r"SparseKConfig.layers must be None or indices of layers, got \[-1\]"),
        ({"layers": ["0"]}, r"SparseKConfig.layers must be None or indices of layers, got \['0'\]"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseKConfig(**settings)
