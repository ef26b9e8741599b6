import json
from dataclasses import fields

import pytest
from peft import PeftConfig

from hf_sparse import SparsefinderConfig
from hf_sparse.methods.sparsefinder.predictors import predictor_of
from hf_sparse.methods.sparsefinder.settings import SparsefinderSettings


def test_defaults():
    config = SparsefinderConfig()
    assert (config.alpha, config.rank, config.predictor, config.tile, config.sparsity) == (
        1.5,
        4,
        "clustering",
        64,
        0.8,
    )
    assert config.layers is None


@pytest.mark.parametrize(
    "settings, learns, whole",
    [
        ({"predictor": "full"}, False, False),
        ({"predictor": "bound", "balanced": True}, False, False),
        ({"predictor": "distance", "bin_kind": "fixed"}, True, False),
        ({"predictor": "clustering", "balanced": True}, True, True),
        ({"predictor": "quantization", "balanced": True}, True, False),
        ({"predictor": "quantization", "bin_kind": "fixed"}, True, True),
    ],
)
def test_what_a_predictor_needs(settings, learns, whole):
    config = SparsefinderConfig(**settings)
    predictor = predictor_of(config)
    assert (predictor.learns_graph, predictor.needs_whole_text) == (learns, whole)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 2, "predictor": "quantization", "bin_kind": "fixed", "tile": None, "window": 0},
        {"learn_alpha": True, "shared_projection": True, "layers": [3, 1, 1], "task_type": "CAUSAL_LM"},
        {"tiles_per_query": 3, "complete": True, "base_shape": {"model_type": "llama"}, "revision": "v1"},
    ],
)
def test_json_round_trip(settings, tmp_path):
    config = SparsefinderConfig(**settings)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "HF_SPARSE_SPARSEFINDER"
    for loaded in (SparsefinderConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SparsefinderConfig
        assert {**loaded.to_dict(), "inference_mode": False} == config.to_dict()


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_causal_tiles_come_nearest_to_the_sparsity(tile, sparsity):
    tiles = 1024 // tile
    listed = [sum(min(row, m) for row in range(1, tiles + 1)) for m in range(1, tiles + 1)]
    wanted = (1 - sparsity) * tiles * (tiles + 1) / 2
    best = min(range(tiles), key=lambda i: abs(listed[i] - wanted)) + 1
    assert SparsefinderConfig(tile=tile, sparsity=sparsity, length=1024).causal_tiles == best
    assert SparsefinderConfig(tile=tile, sparsity=sparsity, length=1023).causal_tiles == best
    assert SparsefinderConfig(tile=tile, sparsity=sparsity, tiles_per_query=5).causal_tiles == 5


def test_tokens_have_no_tiles():
    with pytest.raises(ValueError, match="a graph of tokens has no tiles"):
        _ = SparsefinderConfig(tile=None).causal_tiles


def test_every_field_says_what_it_is():
    declared = [field for field in fields(SparsefinderSettings) if field.name in SparsefinderSettings.__annotations__]
    assert len(declared) > 20 and all(len(field.metadata["help"]) > 20 for field in declared)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": 1}, "alpha must be above 1 and at most 2, got 1"),
        ({"alpha": 2.5}, "alpha must be above 1 and at most 2, got 2.5"),
        ({"alpha": float("nan")}, "alpha must be above 1 and at most 2, got nan"),
        ({"alpha": "1.5"}, "alpha must be above 1 and at most 2, got '1.5'"),
        ({"alpha": 2.0, "learn_alpha": True}, "alpha must be above 1.01 and below 2 to be learned, got 2.0"),
        ({"alpha": 1.005, "learn_alpha": True}, "alpha must be above 1.01 and below 2 to be learned, got 1.005"),
        ({"learn_alpha": 1}, "learn_alpha must be True or False, got 1"),
        ({"initial_scale": 0}, "initial_scale must be a number above 0, got 0"),
        ({"initial_scale": float("inf")}, "initial_scale must be a number above 0, got inf"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": True}, "rank must be an integer of at least 1, got True"),
        ({"shared_projection": "yes"}, "shared_projection must be True or False, got 'yes'"),
        ({"predictor": "kmeans"}, "predictor must be one of 'clustering', 'quantization', .*, got 'kmeans'"),
        ({"predictor": ["full"]}, r"predictor must be one of .*, got \['full'\]"),
        ({"clusters": 1}, "clusters must be an integer of at least 2, got 1"),
        ({"clusters": 4, "top_clusters": 5}, "top_clusters must be at most the number of clusters, 4, got 5"),
        ({"bins": 1}, "bins must be an integer of at least 2, got 1"),
        ({"bin_kind": "equal"}, "bin_kind must be one of 'shared', 'fixed', got 'equal'"),
        ({"bin_width": 0}, "bin_width must be an integer of at least 1, got 0"),
        ({"threshold": -1}, "threshold must be a number above 0, got -1"),
        ({"tile": 48}, "tile must be None or one of 1, 2, 4, 8, 16, 32, 64, 128, got 48"),
        ({"tile": None, "complete": True}, "tile must be a number for complete=True"),
        ({"tile": None, "predictor": "bound"}, "tile must be a number for .* 'bound', .* got None"),
        ({"tile": 8, "query_tile": 16}, "query_tile must be None or a power of 2 up to tile, which is 8, got 16"),
        ({"query_tile": 3}, "query_tile must be None or a power of 2 up to tile, which is 64, got 3"),
        ({"tile": None, "query_tile": 1}, "query_tile must be None or a power of 2 up to tile, which is None, got 1"),
        ({"cluster_parts": 0}, "cluster_parts must be an integer of at least 1, got 0"),
        ({"cluster_parts": 3}, "cluster_parts must be a divisor of the rank, 4, got 3"),
        ({"cluster_parts": 2, "balanced": True}, "cluster_parts must be 1 but for .* not balanced, got 2"),
        ({"cluster_parts": 2, "predictor": "distance"}, "cluster_parts must be 1 but for .* 'clustering' .*, got 2"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0"),
        ({"tiles_per_query": 0}, "tiles_per_query must be None or an integer of at least 1, got 0"),
        ({"length": 0}, "length must be an integer of at least 1, got 0"),
        ({"window": -1}, "window must be an integer of at least 0, got -1"),
        ({"global_tokens": 1.5}, "global_tokens must be an integer of at least 0, got 1.5"),
        ({"layers": []}, r"layers must be None or a list of indices of layers, got \[\]"),
        ({"layers": [True]}, r"layers must be None or a list of indices of layers, got \[True\]"),
        ({"layers": 3}, "layers must be None or a list of indices of layers, got 3"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"SparsefinderConfig.{message}"):
        SparsefinderConfig(**settings)
