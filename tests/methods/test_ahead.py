"""Decoding steps on the CPU that are foreseen, against steps that score their token and find its slot at once."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.methods.sparsek import SparseKCacheLayer, ahead, attention

IDS = torch.randint(2, 64, (3, 50), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(50) >= torch.tensor([0, 17, 45])[:, None]


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama(), SparseKConfig(k=6, window=12, sinks=2))


@pytest.fixture
def taken(monkeypatch):
    """The steps that were foreseen: a list that grows with each of a layer."""
    steps, step_ahead = [], attention.step_ahead

    def spy(*arguments):
        output = step_ahead(*arguments)
        if output is not None:
            steps.append(output.shape)
        return output

    monkeypatch.setattr(attention, "step_ahead", spy)
    return steps


def steps_at_once(monkeypatch):
    monkeypatch.setattr(attention, "step_ahead", lambda *_: None)


def assert_same_slots(cache, other):
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.ordered()[3], expected.ordered()[3])
        for tensor, reference in zip(layer.ordered(), expected.ordered(), strict=True):
            torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.seen, expected.seen)


def generate(model, **options):
    settings = {"max_new_tokens": 45, "min_new_tokens": 45, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(IDS, output_logits=True, **settings, **options)


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    "options", [{}, {"attention_mask": MASK.long()}, {"num_beams": 2}], ids=["whole", "left", "beams"]
)
@pytest.mark.parametrize(
    "settings", [{}, {"scorer": "mlp", "scorer_hidden_size": 8}, {"position_slope": 0.01}], ids=str
)
def test_generate_says_the_same(tiny_llama, taken, monkeypatch, options, settings):
    model = patch(tiny_llama(), SparseKConfig(k=6, window=12, sinks=2, **settings))
    output = generate(model, **options)
    assert len(taken) == 44 * model.config.num_hidden_layers
    steps_at_once(monkeypatch)
    expected = generate(model, **options)
    assert torch.equal(output.sequences, expected.sequences)
    for logits, reference in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)
    assert_same_slots(cache_of(output), cache_of(expected))


def feed(model, cache, text, pieces):
    begin, logits = 0, []
    with torch.no_grad():
        for length in pieces:
            part = text[:, begin : begin + length]
            logits.append(model(part, **with_cache(cache), use_cache=True).logits)
            begin += length
    return torch.cat(logits, 1)


@pytest.mark.parametrize("pieces", [[1] * 50, [3] + [1] * 20 + [7] + [1] * 20, [40] + [1] * 10], ids=str)
def test_steps_before_and_after_longer_inputs(model, taken, monkeypatch, pieces):
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    logits = feed(model, caches[0], IDS, pieces)
    assert len(taken) == model.config.num_hidden_layers * (pieces.count(1) - (pieces[0] == 1))
    steps_at_once(monkeypatch)
    torch.testing.assert_close(logits, feed(model, caches[1], IDS, pieces), rtol=1e-4, atol=1e-4)
    assert_same_slots(*caches)


def reset(cache):
    cache.reset()
    return cache


CHANGES = {
    "copied": copy.deepcopy,
    "cropped": lambda cache: cache.crop(-2) or cache,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])) or cache,
    "repeated": lambda cache: cache.batch_repeat_interleave(2) or cache,
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])) or cache,
    "reset": reset,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_to_a_cache_between_two_steps(model, taken, monkeypatch, change):
    outcomes = []
    for at_once in (False, True):
        if at_once:
            steps_at_once(monkeypatch)
        cache = DynamicCache(config=model.config)
        feed(model, cache, IDS, [10] + [1] * 5)
        cache = CHANGES[change](cache)
        rows = cache.layers[0].keys.shape[0]
        text = IDS[:1].expand(rows, -1)
        outcomes.append((feed(model, cache, text, [1] * 30), cache))
    assert taken
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-4, atol=1e-4)
    assert_same_slots(outcomes[0][1], outcomes[1][1])


def test_a_copy_and_its_origin_go_different_ways(model):
    cache = DynamicCache(config=model.config)
    feed(model, cache, IDS, [20] + [1] * 5)
    other = copy.deepcopy(cache)
    expected = feed(model, copy.deepcopy(cache), IDS, [1] * 20)
    feed(model, other, IDS.flip(1), [1] * 20)
    torch.testing.assert_close(feed(model, cache, IDS, [1] * 20), expected)


def test_inputs_are_scored_together_and_when_they_are_asked_for(model):
    cache = DynamicCache(config=model.config)
    feed(model, cache, IDS, [20] + [1] * 5)
    layer = cache.layers[0]
    assert isinstance(layer, SparseKCacheLayer) and layer.ahead is not None and len(layer.ahead.states) == 5
    newest = layer.positions.argmax(-1, keepdim=True)
    scored = layer.scores.gather(-1, newest)
    assert layer.ahead is None and bool((scored != 0).all())


@pytest.mark.parametrize("reason", ["gradients", "padding", "a short window", "many rows"])
def test_other_steps_take_the_other_path(tiny_llama, taken, monkeypatch, reason):
    monkeypatch.setattr(ahead, "_MOST_ROWS", 5 if reason == "many rows" else 64)
    model = patch(tiny_llama(), SparseKConfig(k=6, window=2 if reason == "a short window" else 12, sinks=2))
    cache, mask = DynamicCache(config=model.config), torch.ones(3, 41, dtype=torch.long)
    if reason == "padding":
        mask[1, -1] = 0
    with torch.no_grad():
        model(IDS[:, :40], **with_cache(cache), use_cache=True)
    with torch.set_grad_enabled(reason == "gradients"):
        model(IDS[:, 40:41], attention_mask=mask, **with_cache(cache), use_cache=True)
    assert not taken
