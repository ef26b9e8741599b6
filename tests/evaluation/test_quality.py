"""Losses by position and divergence from dense attention, against plain definitions."""

import math
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

import hf_sparse
from hf_sparse._compat import cache_of
from hf_sparse.evaluation import compare, divergence, perplexity, quality, using
from hf_sparse.evaluation.quality import Losses, position_edges
from hf_sparse.methods.sparsek import Budget
from hf_sparse.methods.sparsek.evaluation import at_budget, budget_of
from hf_sparse.patches import sparse_layers

LENGTH = 40


@pytest.fixture
def model(tiny_llama):
    return get_peft_model(tiny_llama(), hf_sparse.SparseKConfig(k=5, window=6, sinks=2)).eval()


@pytest.fixture
def chunks():
    return torch.randint(0, 64, (3, LENGTH))


@torch.no_grad()
def log_probabilities(model, chunks, name):
    with using(model, name):
        return model(input_ids=chunks).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("positions", [7, 512])
@pytest.mark.parametrize("name", ["learned", "recency", "tova"])
def test_compare_is_the_definition(model, chunks, name, positions, monkeypatch):
    monkeypatch.setattr(quality, "_SLICE", positions)
    run = (budget_of(model), name)
    found = compare(model, chunks, [run], batch_size=2)[run]
    dense, sparse = (log_probabilities(model, chunks, which) for which in ("dense", name))
    nats = -sparse.gather(-1, chunks[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found.nats.double(), nats, atol=1e-5, rtol=0)
    expected = (dense.exp() * (dense - sparse)).sum(-1)
    torch.testing.assert_close(found.divergence.double(), expected, atol=1e-5, rtol=0)
    assert found.perplexity == pytest.approx(nats.mean().exp().item(), rel=1e-5)
    assert divergence(model, chunks, name) == pytest.approx(expected.mean().item(), abs=1e-6) != 0


def test_compare_agrees_with_perplexity(model, chunks):
    budgets = (budget_of(model), Budget(k=2, window=3, sinks=1))
    runs = [(budget, name) for budget in budgets for name in ("dense", "learned")]
    found = compare(model, chunks, runs)
    for budget, name in runs:
        with at_budget(model, budget), using(model, name):
            assert found[budget, name].perplexity == pytest.approx(perplexity(model, chunks), rel=1e-6)
    assert found[budgets[0], "dense"].mean_divergence == found[budgets[1], "dense"].mean_divergence == 0
    assert found[runs[1]].mean_divergence < found[runs[3]].mean_divergence  # fewer slots are further from dense


def test_divergence_in_half_precision_is_computed_in_float32(model, chunks):
    model.to(torch.bfloat16)
    dense, sparse = (log_probabilities(model, chunks, which) for which in ("dense", "learned"))
    expected = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    assert divergence(model, chunks, "learned") == pytest.approx(expected, rel=1e-4)


def test_by_position():
    nats = torch.tensor([[1.0, 2.0, 3.0, 6.0], [3.0, 2.0, 5.0, 8.0]])  # of the tokens at positions 1 to 4
    losses = Losses(nats, torch.zeros_like(nats))
    assert losses.by_position([1, 3, 5]) == pytest.approx([math.exp(2), math.exp(5.5)])
    assert losses.by_position([1, 5]) == pytest.approx([losses.perplexity])


@pytest.mark.parametrize("length", [2, 5, 17, 18, 100, 2048])
def test_edges_cover_every_predicted_position_once(length):
    edges = position_edges(length)
    assert edges[0] == 1 and edges[-1] == length and len(edges) == 1 + min(16, length - 1)
    widths = [stop - start for start, stop in pairwise(edges)]
    assert min(widths) >= 1 and max(widths) - min(widths) <= 1


class TestBudget:
    @pytest.mark.parametrize(
        ("slots", "sinks", "k", "window"), [(512, 4, 380, 128), (128, 4, 92, 32), (6, 4, 1, 1), (2, 0, 1, 1)]
    )
    def test_resized(self, slots, sinks, k, window):
        found = Budget(k=192 - sinks, window=64, sinks=sinks).resized(slots)
        assert found == Budget(k=k, window=window, sinks=sinks) and found.slots == slots

    def test_the_size_it_has_changes_nothing(self):
        for budget in (Budget(124, 128, 4), Budget(1, 7, 0), Budget(30, 1, 2)):
            assert budget.resized(budget.slots) == budget

    @pytest.mark.parametrize(("slots", "sinks", "least"), [(5, 4, 6), (1, 0, 2), (0, 1, 3), (-5, 0, 2)])
    def test_refuses(self, slots, sinks, least):
        with pytest.raises(ValueError, match=f"slots must be at least {least}, got {slots}"):
            Budget(10, 10, sinks).resized(slots)

    def test_at_budget(self, model, chunks):
        with pytest.raises(KeyboardInterrupt), at_budget(model, Budget(k=2, window=3, sinks=1)):
            assert cache_of(model(input_ids=chunks, use_cache=True)).layers[0].keys.shape[2] == 6
            raise KeyboardInterrupt
        assert {method.config.slots for method in sparse_layers(model)} == {13}
