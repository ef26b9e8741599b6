"""Whole texts of which nothing is kept: what their attention asks for, and where it takes another path."""

import pytest
import torch

from hf_sparse import SparseKConfig, patch
from hf_sparse.methods.sparsek import attention
from hf_sparse.patches import sparse_layers

BUDGET = {"k": 8, "window": 12, "sinks": 2}  # 22 slots


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_text_that_fits_needs_no_scores(mode, tiny_llama, monkeypatch):
    """It has the logits of the dense model to the last bit, and one token more is scored."""
    ids = torch.randint(0, 64, (2, 23))
    with mode():
        expected = tiny_llama()(ids[:, :22], use_cache=False).logits
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    scored = []
    score = attention.SparseKAttention.score
    monkeypatch.setattr(attention.SparseKAttention, "score", lambda *args: (scored.append(1), score(*args))[1])
    with mode():
        assert torch.equal(model(ids[:, :22], use_cache=False).logits, expected) and not scored
        model(ids, use_cache=False)
    assert len(scored) == len(sparse_layers(model))


@pytest.mark.parametrize("length", [22, 60])
@pytest.mark.parametrize("shares", [{}, {"head_shares": [[0.5, 1.0], [1.75, 0.75]]}], ids=["equal", "heads"])
def test_the_result_is_that_of_a_forward_with_a_cache(length, shares, tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, **shares))
    ids = torch.randint(0, 64, (2, length))
    with torch.no_grad():
        with_cache, alone = (model(ids, use_cache=use_cache).logits for use_cache in (True, False))
    torch.testing.assert_close(alone, with_cache)


@pytest.mark.parametrize("learns", [False, True])
def test_who_looks_on_or_learns_gets_scores(learns, tiny_llama, monkeypatch):
    """An observer gets them of a text that fits too, and so do gradients and the soft gates of `train` mode."""
    model, ids = patch(tiny_llama(), SparseKConfig(**BUDGET)), torch.randint(0, 64, (1, 9))
    layers = sparse_layers(model, attention.SparseKAttention)
    seen = []
    score = attention.SparseKAttention.score
    monkeypatch.setattr(attention.SparseKAttention, "score", lambda *args: (seen.append("scored"), score(*args))[1])
    if learns:
        model(ids, use_cache=False)
        with torch.no_grad():
            model.train()(ids, use_cache=False)
        assert seen == ["scored"] * 2 * len(layers)
        return
    for layer in layers:
        layer.observer = lambda query, key, scores, scaling: seen.append(scores.shape)
    with torch.no_grad():
        model(ids, use_cache=False)
    assert seen == ["scored", (1, 2, 9)] * len(layers)
