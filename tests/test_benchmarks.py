"""Check what scripts in `benchmarks/` make of their arguments, where a run on a GPU would be the first to tell."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

from hf_sparse.patches import sparse_layers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("training", [[], [300]])
def test_heads_are_measured_without_training_too(monkeypatch, training):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("head_shares")
    options = {"k": 10, "window": 4, "sinks": 2, "least": 0.4, "dtype": "float32", "device": "cpu", "tiny": True}
    models = script.make_models(script.SHAPES["smollm2"], Namespace(prompts=[200], training=training, **options))
    assert script.cache_bytes(models) > 0
    shares = [sparse_layers(model)[0].config.head_shares for model in models.values()]
    assert shares[0] is None and min(map(min, shares[1])) == 0.4
    assert models["equal"].config.max_position_embeddings == max([200, *training]) + script.MANY
