"""Attention modules of a patched model have a class of their own, and are otherwise what they were."""

import copy
import inspect
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse.patches import sparse_layers

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
