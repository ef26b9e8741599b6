"""Attention modules of a patched model have a class of their own, and are otherwise what they were."""

import copy
import inspect
import pickle
import runpy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import hf_sparse
from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse._compat import with_cache
from hf_sparse.core.cache import ModelCall
from hf_sparse.methods.sparsek import SparseKCacheLayer
from hf_sparse.patches import interface, sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
IDS = torch.arange(24)[None] % 60


def attention_of(model) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


@pytest.fixture
def base():
    return FAMILIES["llama"].make().eval()


@pytest.fixture
def model(base):
    return patch(base, SparseKConfig(k=4, window=4, sinks=1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_it_derives_from_the_class_of_the_model_and_goes_with_the_patch(base):
    kinds, text = [type(module) for module in attention_of(base)], repr(base)
    patch(base, SparseKConfig(k=4, window=4, sinks=1))
    for module, kind in zip(attention_of(base), kinds, strict=True):
        assert isinstance(module, kind) and type(module) is not kind
        assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
        assert inspect.signature(module.forward) == inspect.signature(kind.forward.__get__(module))
    assert len({type(module) for module in attention_of(base)}) == 1
    assert not any(module._forward_pre_hooks for module in attention_of(base)[1:])  # which would be called slowly
    unpatch(base)
    assert [type(module) for module in attention_of(base)] == kinds and repr(base) == text


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_attends_by_its_own_layers(model, copied):
    other = copied(model)
    expected = logits(model)
    assert torch.equal(logits(other), expected)
    for layer in sparse_layers(model):
        layer.sparsek_scorer["default"].weight.data.mul_(-1)
    changed = logits(model)
    assert torch.equal(logits(other), expected) and not torch.equal(changed, expected)
    unpatch(other)
    assert torch.equal(logits(model), changed)


@pytest.mark.parametrize("config", [SparseKConfig(k=4, window=4, sinks=1), SparsefinderConfig(predictor="full")])
def test_a_class_that_others_derive_from_it_outlives_the_patch(base, config):
    """As that of FSDP2 does, and torch's parametrizations."""
    expected = logits(base)
    patch(base, config)
    module = attention_of(base)[0]
    derived = type("Derived", (type(module),), {})
    module.__class__ = derived
    unpatch(base)
    assert type(module) is derived and torch.equal(logits(base), expected)
    patch(base, config)
    assert type(module) is derived and not torch.equal(logits(base), expected)


def test_a_copy_keeps_a_class_that_others_derive_from_it(model):
    module = attention_of(model)[0]
    module.__class__ = type("Derived", (type(module),), {})
    copied = copy.deepcopy(module)
    assert type(copied) is type(module)


def test_a_forward_of_its_own_is_called_in_a_hook(base):
    """As accelerate sets it for a model on several devices, and leaves it where its hooks are removed again."""
    calls = []
    for module in attention_of(base):
        given = module.forward
        module.forward = lambda *args, given=given, **kwargs: calls.append(1) or given(*args, **kwargs)
    expected, count = logits(base), len(calls)
    patch(base, SparseKConfig(k=4, window=4, sinks=1))
    assert not torch.equal(logits(base), expected) and len(calls) == 2 * count
    unpatch(base)
    assert torch.equal(logits(base), expected) and not any(module._forward_pre_hooks for module in attention_of(base))


@pytest.mark.parametrize("hooks", ["stay", "removed"])
def test_a_model_that_accelerate_dispatched(base, hooks):
    expected = logits(patch(copy.deepcopy(base), SparseKConfig(k=4, window=4, sinks=1)))
    accelerate.dispatch_model(base, {"": "cpu"}, main_device="cpu", force_hooks=True)
    if hooks == "removed":
        accelerate.hooks.remove_hook_from_submodules(base)
    torch.manual_seed(0)
    assert torch.equal(logits(patch(base, SparseKConfig(k=4, window=4, sinks=1))), expected)


def test_a_forward_that_is_replaced_in_the_class_later_is_called(model, monkeypatch):
    module: Any = attention_of(model)[0]
    kind, calls = module.unpatched_class, []
    given = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: calls.append(1) or given(*args, **kwargs))
    logits(model)
    assert len(calls) == len(attention_of(model))


def test_a_parametrization_of_the_module_itself_goes_as_it_came(base):
    module = attention_of(base)[0]
    module.register_parameter("factor", nn.Parameter(torch.ones(3)))
    nn.utils.parametrize.register_parametrization(module, "factor", nn.Identity())
    expected = logits(base)
    patch(base, SparseKConfig(k=4, window=4, sinks=1))
    assert not torch.equal(logits(base), expected)
    nn.utils.parametrize.remove_parametrizations(module, "factor")
    assert not torch.equal(logits(base), expected)
    unpatch(base)
    assert torch.equal(logits(base), expected)


def test_a_layer_that_an_error_left_with_keys_is_checked(model):
    """It was made in a call that did not end, and holds what its mask says nothing of."""
    cache = hf_sparse.SparseCache(model)
    with torch.no_grad():
        model(IDS[:, :10], **with_cache(cache))
        layer = cache.layers[1]
        layer.call = ModelCall()
        layer.seen.zero_()
        with pytest.raises(ValueError, match="real tokens before the new ones"):
            model(IDS[:, 10:13], **with_cache(cache))


def test_a_compiled_step_of_a_layer_that_no_call_has_made_is_compiled_once():
    cache = SparseKCacheLayer(4, 3, 1)
    cache.lazy_initialization(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(tensor):
        cache.begin_attention()
        output = tensor + 1 if cache.call is None else tensor
        interface._end(cache)
        return output + cache.keys.sum()

    for _ in range(3):
        assert step(torch.zeros(1)) == 1
    assert counter.frame_count == 1
