"""Check what scripts in `benchmarks/` make of their arguments, where a run on a GPU would be the first to tell."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from hf_sparse.patches import sparse_layers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("variant", ["static", "sparse eager"])
def test_steps_after_a_cache_that_no_prompt_filled(monkeypatch, variant):
    """Within the slots they are those of dense attention over the same keys."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("model")
    options = Namespace(tiny=True, device="cpu", contexts=[64], steps=4, k=12, window=16, sinks=4)
    model = script.make_model(options, script.LLAMA_8B | {"vocab_size": 64}, torch.float32)

    def logits(variant: str) -> torch.Tensor:
        script.prepare(model, variant, options)
        torch.manual_seed(0)
        watch = script.Watch(keep=True)
        script.steps(model, script.filled(model, variant, 2, 27, 5), 2, 27, 5, watch, eager=True)
        return torch.stack(watch.logits)

    torch.testing.assert_close(logits(variant), logits("dynamic"), rtol=1e-4, atol=1e-4)


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
