"""Budgets of heads: what each loses alone, and how the selected keys are divided by it."""

import pytest
import torch

from hf_sparse import SparseKConfig, patch
from hf_sparse.errors import DataError
from hf_sparse.evaluation import compare
from hf_sparse.methods.sparsek.evaluation import budget_of, divide_heads, head_damages
from hf_sparse.methods.sparsek.evaluation.layer_shares import best_shares
from hf_sparse.patches import sparse_layers


@pytest.fixture
def chunks():
    return torch.randint(0, 64, (2, 60), generator=torch.Generator().manual_seed(0))


def patched(tiny_llama, **settings):
    return patch(tiny_llama(), SparseKConfig(**{"k": 8, "window": 6, "sinks": 2, **settings})).eval()


def test_damage_is_that_of_one_sparse_head(tiny_llama, chunks):
    model = patched(tiny_llama)
    found = head_damages(model, chunks, 4, progress=False)
    assert list(found) == [(0, 0), (0, 1), (1, 0), (1, 1)] and budget_of(model) == (8, 6, 2)
    assert sparse_layers(model)[0].config.head_shares is None
    alone = patched(tiny_llama, k=60, head_shares=[[1.3, 1.3], [1.3, 0.1]])  # 78, or 6 keys
    for mine, theirs in zip(sparse_layers(alone), sparse_layers(model), strict=True):
        mine.sparsek_scorer.load_state_dict(theirs.sparsek_scorer.state_dict())
    run = (budget_of(alone), "learned")
    expected = head_damages(model, chunks, 6, progress=False)[1, 1]
    assert expected == pytest.approx(compare(alone, chunks, [run])[run].mean_divergence, abs=1e-6)
    assert min(found.values()) > 0 and found[1, 1] > expected


def test_divide(tiny_llama, chunks):
    model = patched(tiny_llama)
    shares, damages = divide_heads(model, chunks, progress=False)
    few, many = (list(damages[k].values()) for k in (4, 16))
    assert sorted(damages) == [4, 16] and damages[4] == head_damages(model, chunks, 4, progress=False)
    assert [share for row in shares for share in row] == best_shares(few, many, (4, 16), way=1.0)
    assert SparseKConfig(k=8, head_shares=shares).head_shares == shares


def test_a_layer_that_is_not_patched_keeps_its_share(tiny_llama, chunks):
    shares, damages = divide_heads(patched(tiny_llama, layers=[1]), chunks, progress=False)
    assert shares[0] == [1.0, 1.0] and shares[1] != [1.0, 1.0] and list(damages[4]) == [(1, 0), (1, 1)]


def test_refusals(tiny_llama, chunks):
    model = patched(tiny_llama)
    with pytest.raises(DataError, match="nothing is evicted: 60 slots cover the whole text of 60 tokens"):
        head_damages(model, chunks, 52)
    with pytest.raises(ValueError, match="expected a model with sparse attention"):
        divide_heads(tiny_llama(), chunks)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        head_damages(model, chunks, 4, batch_size=0)
    with pytest.raises(DataError, match=r"k=1\), which cannot be divided among heads"):
        divide_heads(patched(tiny_llama, k=1), chunks)
