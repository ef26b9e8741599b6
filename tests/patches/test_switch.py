"""What `generate` announces to the layers of a patched model before it reads a prompt: once for calls of a kind."""

import pytest
import torch

from hf_sparse import SparseKConfig, patch
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
