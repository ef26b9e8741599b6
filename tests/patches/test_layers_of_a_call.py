"""In a forward that keeps nothing all layers are checked at one of them, and attend in little Python from there."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import hf_sparse
from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse._compat import with_cache
from hf_sparse.core.backbone_call import backbone_call
from hf_sparse.methods.sparsek import SparseKAttention, SparseKCacheLayer
from hf_sparse.methods.sparsek.baselines import Recency
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
IDS = torch.arange(24)[None] % 60


@pytest.fixture
def model():
    base = FAMILIES["llama"].make(num_hidden_layers=3).eval()
    return patch(base, SparseKConfig(k=20, window=4, sinks=1))


@pytest.fixture
def attended(monkeypatch):
    """List the layers that attend in the long way."""
    layers, attend = [], SparseKAttention.attend

    def note(self, *args, **kwargs):
        layers.append(self.layer)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(SparseKAttention, "attend", note)
    return layers


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **{"use_cache": False} | inputs).logits


def logits_without_a_call(model, **inputs):
    """The forward of the base model's backbone, in which no layer knows of the others."""
    with torch.no_grad():
        inputs = {"input_ids": IDS, "use_cache": False} | inputs
        output = type(model.model).unpatched_class.forward(model.model, **inputs)
        return model.lm_head(output[0])


def test_a_text_that_fits_is_that_of_the_base_model(model, attended):
    found = logits(model)
    assert attended == []
    unpatch(model)
    assert torch.equal(found, logits(model))


def test_a_long_text_is_checked_at_the_second_layer(model, attended, monkeypatch):
    """At the first one a GPU would wait for it."""
    monkeypatch.setattr("hf_sparse.patches.interface._MOST_PRODUCTS", 0)
    found = logits(model)
    assert attended == [0] and torch.equal(found, logits_without_a_call(model))


@pytest.mark.parametrize("inputs", [{"attention_mask": (IDS > 2).long()}, {"use_cache": True}], ids=["mask", "cache"])
def test_what_is_attended_in_the_long_way(model, attended, inputs):
    expected = logits(model, **inputs)
    assert attended == [0, 1, 2]
    with torch.no_grad():  # a layer at a time, outside of a forward of the backbone
        found = model.lm_head(
            type(model.model).unpatched_class.forward(model.model, IDS, **{"use_cache": False} | inputs)[0]
        )
    assert torch.equal(found, expected)


def observe(model):
    for layer in sparse_layers(model):
        layer.observer = lambda *_: None


def choose_by_a_baseline(model):
    for layer in sparse_layers(model):
        layer.baseline = Recency()


def attend_nearby(model):
    for layer in sparse_layers(model):
        layer.dense_window = 3


def train(model):
    model.train()


@pytest.mark.parametrize("change", [observe, choose_by_a_baseline, attend_nearby, train])
def test_layers_that_do_otherwise(model, attended, change):
    change(model)
    assert torch.equal(logits(model), logits_without_a_call(model))


def test_gradients_take_the_long_way(model, attended):
    model.train()
    with pytest.warns(UserWarning, match="learn nothing"):
        model(IDS, use_cache=False).logits.sum().backward()
    assert attended == [0, 1, 2]


def test_autocast_takes_the_long_way(model, attended):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model)
    assert attended == [0, 1, 2]


def test_a_layer_without_an_adapter_between_calls(model):
    """It attends densely, and the others as before."""
    sparse = logits(model, IDS.repeat(1, 2))
    sparse_layers(model)[2].set_adapter([])
    found = logits(model, IDS.repeat(1, 2))
    assert not torch.equal(found, sparse)
    assert torch.equal(found, logits_without_a_call(model, input_ids=IDS.repeat(1, 2)))


def test_each_call_checks_anew(model):
    logits(model)
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        logits(model, output_attentions=True)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="implementation of a patched model was changed"):
        logits(model)


def test_an_error_leaves_nothing(model, attended):
    with pytest.raises(IndexError):
        logits(model, IDS + 1000)
    assert logits(model).isfinite().all() and attended == []


def test_another_method_goes_on_as_ever():
    base = FAMILIES["llama"].make(num_hidden_layers=3).eval()
    model = patch(base, SparsefinderConfig(predictor="full"))
    assert torch.equal(logits(model), logits_without_a_call(model))


def test_a_model_within_a_forward_of_another(model):
    """Its layers were not checked in that one."""
    other = patch(FAMILIES["llama"].make(num_hidden_layers=3).eval(), SparseKConfig(k=4, window=4, sinks=1))
    expected = logits(other)
    with backbone_call():
        logits(model)
        assert torch.equal(logits(other), expected)
    assert hf_sparse.patches.interface.current_call() is None


@pytest.mark.parametrize("change", ["switched off", "another implementation", "attentions", "trace"])
def test_a_cache_that_an_error_left_is_checked_anew(model, change):
    """Also where the first layer made the cache layers of all and its attention failed."""
    cache, inputs = DynamicCache(config=model.config), {}
    with pytest.raises(ValueError, match="takes a padding mask"):
        logits(model, attention_mask=torch.ones(1, 1, 24, 24, dtype=torch.bool), use_cache=True, **with_cache(cache))
    assert all(type(layer) is SparseKCacheLayer for layer in cache.layers)
    if change == "switched off":
        for layer in sparse_layers(model):
            layer.switch(False)
        with pytest.raises(RuntimeError, match="start a new cache"):
            logits(model, use_cache=True, **with_cache(cache))
        return
    if change == "another implementation":
        model.config._attn_implementation, expected = "sdpa", "was changed to 'sdpa'"
    elif change == "attentions":
        inputs, expected = {"output_attentions": True}, "output_attentions"
    else:
        expected = r"torch\.jit\.trace would record"
    with pytest.raises(ValueError, match=expected):
        if change == "trace":
            model.requires_grad_(False)  # the parameters are constants to a function that is traced
            torch.jit.trace(lambda ids: model(ids, use_cache=True, **with_cache(cache)).logits, IDS)
        else:
            logits(model, use_cache=True, **with_cache(cache), **inputs)


def test_a_cache_that_an_error_left_goes_on(model):
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="takes a padding mask"):
        logits(model, attention_mask=torch.ones(1, 1, 24, 24, dtype=torch.bool), use_cache=True, **with_cache(cache))
    found = [logits(model, ids, use_cache=True, **with_cache(cache)) for ids in IDS.repeat(1, 2).split([40, 8], 1)]
    cache = DynamicCache(config=model.config)
    expected = [logits(model, ids, use_cache=True, **with_cache(cache)) for ids in IDS.repeat(1, 2).split([40, 8], 1)]
    torch.testing.assert_close(found, expected)


def test_vmap_over_texts(model):
    texts = torch.stack([IDS, IDS + 1])
    found = torch.func.vmap(lambda ids: logits(model, ids))(texts)
    torch.testing.assert_close(found, torch.stack([logits(model, ids) for ids in texts]))
