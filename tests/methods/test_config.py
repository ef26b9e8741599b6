import json

import pytest
from peft import PeftConfig

from hf_sparse import SparseKConfig


def test_defaults():
    config = SparseKConfig()
    assert (config.k, config.window, config.sinks, config.slots) == (188, 64, 4, 256)
    assert config.scorer == "linear" and config.position_slope == 0.0 and config.learn_slope
    assert config.layers is None and config.layer_shares is None
    assert config.budget(layer=7) == (188, 64, 4) and config.soft_support(10) == 40


def test_support_is_counted_in_k():
    assert SparseKConfig(support=2).soft_support(10) == 20
    assert SparseKConfig().soft_support((1000, 3000, 8000, 9000)) == (4000, 8192, 8192, 9140)
    assert SparseKConfig(support=1).soft_support(9000) == 9000
    assert SparseKConfig(support=None).soft_support(10) is None


@pytest.mark.parametrize("shares", [[0.5, 1.5], [0.25, 0.25, 0.25, 3.25], [1.0] * 3, [1.4999, 0.2501, 1.25]])
@pytest.mark.parametrize("k, window", [(188, 64), (7, 5), (100, 1)])
def test_shares_divide_the_budget_and_leave_its_sum(shares, k, window):
    config = SparseKConfig(k=k, window=window, sinks=2, layer_shares=shares)
    budgets = [config.budget(layer) for layer in range(len(shares))]
    assert all(budget.sinks == 2 and budget.k >= 1 and budget.window >= 1 for budget in budgets)
    for share, budget in zip(shares, budgets, strict=True):
        assert abs(budget.k - share * k) <= 1 and abs(budget.window - share * window) <= 1
    if window > 1:
        assert sum(budget.k for budget in budgets) == k * len(shares)
        assert sum(budget.window for budget in budgets) == window * len(shares)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k": 1, "window": 1, "sinks": 0, "scorer": "mlp", "scorer_hidden_size": 7},
        {"position_slope": 1e-3, "support": None, "layers": [3, 1, 1], "task_type": "CAUSAL_LM"},
        {"layer_shares": [0.5, 1.5], "learn_slope": False},
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
        ({"support": True}, "SparseKConfig.support must be None or an integer of at least 1, got True"),
        ({"position_slope": "steep"}, "SparseKConfig.position_slope must be a finite number, got 'steep'"),
        ({"position_slope": float("nan")}, "SparseKConfig.position_slope must be a finite number, got nan"),
        ({"slope_length": -1}, "SparseKConfig.slope_length must be None or an integer of at least 0, got -1"),
        ({"slope_length": 8.5}, "SparseKConfig.slope_length must be None or an integer of at least 0, got 8.5"),
        ({"learn_slope": "no"}, "SparseKConfig.learn_slope must be True or False, got 'no'"),
        (
            {"layer_shares": [1.0, 0.0]},
            r"SparseKConfig.layer_shares must be None or positive numbers, got \[1.0, 0.0\]",
        ),
        ({"layer_shares": []}, r"SparseKConfig.layer_shares must be None or positive numbers, got \[\]"),
        ({"layer_shares": 1.0}, "SparseKConfig.layer_shares must be None or positive numbers, got 1.0"),
        ({"layer_shares": [1.0, 1.5]}, "layer_shares must be 1 on average.*the mean is 1.2500"),
        ({"layers": 3}, "SparseKConfig.layers must be None or a list of indices of layers, got 3"),
        ({"layers": []}, r"SparseKConfig.layers must be None or a list of indices of layers, got \[\]"),
        ({"layers": [-1]}, r"SparseKConfig.layers must be None or a list of indices of layers, got \[-1\]"),
        ({"layers": ["0"]}, r"SparseKConfig.layers must be None or a list of indices of layers, got \['0'\]"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseKConfig(**settings)
