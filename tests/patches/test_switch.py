"""Test what stands in front of the methods of a patched model, and what `generate` tells its layers before a prompt.

That is announced once for calls of a kind.
"""

import inspect
from types import MethodType

import pytest
import torch
from transformers import GenerationMixin

from hf_sparse import SparseKConfig, patch, unpatch
from hf_sparse.core.generation import announced
from hf_sparse.patches import sparse_layers, switch

BUDGET = {"k": 6, "window": 8, "sinks": 2}
IDS = torch.randint(2, 64, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def told(monkeypatch):
    """List what is announced, with tensors on the CPU that pass for tensors on a GPU."""
    found = []
    monkeypatch.setattr(switch, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(switch, "announced", lambda generation: found.append(generation) or announced(generation))
    return found


def generate(model, rows=2, new=4):
    model.generate(IDS[:rows], max_new_tokens=new, do_sample=False)


def test_a_call_is_announced_once(tiny_llama, told):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    generate(model), generate(model), generate(model, new=1), generate(model, rows=1), generate(model)
    assert [generation is None for generation in told] == [False, True, False, False, True]
    assert [one.has_steps for one in told if one] == [True, False, True]
    assert all(one.layers == sparse_layers(model) for one in told if one)


def test_a_padding_mask_is_announced(tiny_llama, told):
    """Newer transformers leave out one that says nothing."""
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    mask = (torch.arange(30) >= torch.tensor([0, 11])[:, None]).long()
    model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert told[0].is_masked


def test_another_adapter_and_other_layers_are_announced(tiny_llama, told):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    generate(model)
    patch(model, SparseKConfig(**BUDGET), "other")
    for layer in sparse_layers(model):
        layer.set_adapter("other")
    generate(model)
    assert told[1] is not None
    for layer in sparse_layers(model):
        layer.enable_adapters(False)
    generate(model, rows=1)
    assert told[2] is None


def test_nothing_is_announced_on_the_cpu(tiny_llama, monkeypatch):
    model, found = patch(tiny_llama(), SparseKConfig(**BUDGET)), []
    monkeypatch.setattr(switch, "announced", lambda generation: found.append(generation) or announced(generation))
    generate(model)
    assert found == [None]


INPUTS = ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"]


@pytest.mark.parametrize("name", ["get_compiled_call", "save_pretrained", *INPUTS])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_method_that_was_set_in_the_model_is_kept(tiny_llama, name, is_first):
    model, calls = tiny_llama(), []

    def method(self, *args, **kwargs):
        calls.append(name)
        return getattr(type(self), name)(self, *args, **kwargs)

    if is_first:
        setattr(model, name, MethodType(method, model))
    patch(model, SparseKConfig(**BUDGET))
    if not is_first:
        setattr(model, name, MethodType(method, model))
    generate(model)
    assert len(calls) == (4 if name in INPUTS else 0)
    unpatch(model)
    assert vars(model)[name] == MethodType(method, model)


@pytest.mark.parametrize("name", INPUTS)
def test_a_method_that_was_set_in_the_class_is_called(tiny_llama, monkeypatch, name):
    model, calls = patch(tiny_llama(), SparseKConfig(**BUDGET)), []
    original = getattr(GenerationMixin, name)
    assert inspect.signature(getattr(model, name)) == inspect.signature(MethodType(original, model))

    def method(self, *args, **kwargs):
        calls.append(name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), name, method)
    generate(model)
    assert len(calls) == 4
