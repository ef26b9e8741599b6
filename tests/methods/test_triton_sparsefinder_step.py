"""Decoding steps in few launches give what steps in plain PyTorch give, and leave the same cache."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

from hf_sparse import SparsefinderConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsefinder import SparsefinderAttention, attention, fit_predictors, step
from hf_sparse.methods.sparsefinder.predictors import clustering
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 5 if DEVICE == "cuda" else 3  # tokens: the interpreter takes a second for a step
pytestmark = pytest.mark.usefixtures("interpreter")
GRAPH = {"tile": 8, "tiles_per_query": 3, "window": 1, "clusters": 6, "initial_scale": 3.0}
SETTINGS = {
    "all keys": {"predictor": "full"},
    "complete": {"complete": True},
    "all keys, as pooled takes steps": {"predictor": "pooled"},
    "before a graph is fitted": {"entmax_native": 1.5, "initial_scale": 0.3},
    "clusters, a list per query": {"query_tile": 1},
    "clusters, a list for four queries": {"query_tile": 4, "shared_projection": True, "profile": False},
    "clusters by group, alphas of heads": {"query_tile": 1, "per_group": True, "learn_alpha": True},
}
IDS = torch.randint(3, 64, (3, 30), generator=torch.Generator().manual_seed(0)).to(DEVICE)
MASK = torch.ones_like(IDS)
MASK[1, :7] = 0


class Keep(LogitsProcessor):
    def __init__(self):
        self.logits = []

    def __call__(self, input_ids, scores):
        self.logits.append(scores)
        return scores


@pytest.fixture
def launched(monkeypatch):
    """Count steps that took the kernels, and let them run in Triton's interpreter."""
    count = []

    def take(*arguments):
        output = step.take_step(*arguments)
        count.append(output is not None)
        return output

    monkeypatch.setattr(attention, "take_step", take)
    if DEVICE == "cpu":
        monkeypatch.setattr(step, "_launches_on", lambda query: True)
    return count


def make(settings, layers=2):
    torch.manual_seed(0)
    base = FAMILIES["llama"].make(num_hidden_layers=layers).eval().to(DEVICE)
    model = patch(base, SparsefinderConfig(**(GRAPH | settings)))
    if "entmax_native" not in settings:
        fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(IDS, use_cache=False))
    model.generation_config.eos_token_id = None
    return model


def run(model, mask, rows=3, **options):
    keep = Keep()
    defaults = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "disable_compile": True}
    result = model.generate(
        IDS[:rows],
        attention_mask=None if mask is None else mask[:rows],
        logits_processor=LogitsProcessorList([keep]),
        **(defaults | options),
    )
    return result, torch.stack(keep.logits)


@pytest.mark.cross("values")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["one length", "padding"])
def test_steps_are_those_of_plain_pytorch(settings, mask, launched, monkeypatch):
    model = make(settings)
    result, logits = run(model, mask)
    assert launched and all(launched)
    monkeypatch.setattr(attention, "take_step", lambda *_: None)
    expected, expected_logits = run(model, mask)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(result.sequences, expected.sequences)
    for layer, other in zip(cache_of(result).layers, cache_of(expected).layers, strict=True):
        for name in ("keys", "values", "query_codes", "key_codes"):
            ours, theirs = getattr(layer, name), getattr(other, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                real = slice(None) if mask is None else 0
                torch.testing.assert_close(ours[real], theirs[real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings, mask", [
    ("all keys, as pooled takes steps", MASK), ("clusters, a list for four queries", MASK),
    pytest.param("all keys", None, marks=pytest.mark.full),
    pytest.param("clusters, a list per query", None, marks=pytest.mark.full),
])  # fmt: skip
def test_recorded_steps_are_those_of_plain_pytorch(settings, mask, launched, played, monkeypatch):
    """Run the first two of 5 steps, and the fourth, for which there is no room; play the others."""
    monkeypatch.setattr("hf_sparse.methods.sparsefinder.rooms.ROOM", 3)
    model = make(SETTINGS[settings], layers=1 if DEVICE == "cpu" else 2)
    result, logits = run(model, mask, max_new_tokens=6, disable_compile=False)
    assert all(launched) and played == [0, 1]
    monkeypatch.setattr(attention, "take_step", lambda *_: None)
    expected, expected_logits = run(model, mask, max_new_tokens=6)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(result.sequences, expected.sequences)
    layer, other = cache_of(result).layers[0], cache_of(expected).layers[0]
    for name in ("keys", "values", "query_codes", "key_codes"):
        ours, theirs = getattr(layer, name), getattr(other, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.full
def test_a_compiled_step_in_a_static_cache_lists_tiles_in_the_kernel(monkeypatch):
    model = make({"query_tile": 1}, layers=1)
    logits = []
    for kernel in (True, False):
        monkeypatch.setattr(clustering, "takes_kernel", lambda *_, kernel=kernel: kernel)
        torch.compiler.reset()
        compiled = torch.compile(model.__call__, backend="eager", fullgraph=True)
        cache = StaticCache(config=model.config, max_cache_len=36)
        with torch.no_grad():
            model(IDS, **with_cache(cache))
            place = torch.full_like(IDS[:, :1], 30)
            seen = torch.ones((3, 36), dtype=torch.bool, device=DEVICE)
            logits.append(compiled(IDS[:, :1], attention_mask=seen, position_ids=place, **with_cache(cache)).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_beams_and_a_copied_cache(launched, monkeypatch):
    model = make({"query_tile": 1}, layers=1)
    result, _ = run(model, MASK, rows=2, num_beams=2)
    assert all(launched)
    with torch.no_grad():
        prompt = cache_of(model(IDS, use_cache=True))
        model(IDS[:, :1], **with_cache(prompt))  # makes room, and a plan
        logits = []
        for _ in range(2):
            cache = copy.deepcopy(prompt)
            logits.append([model(IDS[:, column, None], **with_cache(cache)).logits for column in (4, 9)][1])
    assert torch.equal(*logits)
    monkeypatch.setattr(attention, "take_step", lambda *_: None)
    assert torch.equal(result.sequences, run(model, MASK, rows=2, num_beams=2)[0].sequences)


def test_settings_that_change_between_steps_are_noticed(launched):
    model = make({"query_tile": 1}, layers=1)
    layers = sparse_layers(model, SparsefinderAttention)
    with torch.no_grad():
        prompt = cache_of(model(IDS, use_cache=True))

    def step_twice(count):
        cache, logits = copy.deepcopy(prompt), []
        for tiles in (3, count):
            with torch.no_grad(), override([layer.config for layer in layers], tiles_per_query=tiles):
                logits.append(model(IDS[:, :1], **with_cache(cache)).logits)
        return logits

    first, same = step_twice(3), step_twice(1)
    assert all(launched) and torch.equal(first[0], same[0]) and not torch.equal(first[1], same[1])
