"""Each objective against its formula, written out."""

import pytest
import torch
import torch.nn.functional as F

import hf_sparse.finetune.objectives as objectives
from hf_sparse.methods.sparsek.attention_objective import attention
from hf_sparse.ops.selection.attention_mass import far_attention_mass
from hf_sparse.patches import NAME, sparse_layers


@pytest.fixture
def model(sparse_llama):
    model = sparse_llama().eval()
    for method in sparse_layers(model):
        method.train()
    return model


@pytest.mark.parametrize("rows", [7, 10_000], ids=["sliced", "whole"])
def test_distill_is_the_divergence_from_the_dense_model(monkeypatch, model, chunks, rows):
    monkeypatch.setattr(objectives, "_ROWS", rows)
    loss = objectives.distill(model, chunks[:2])
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=chunks[:2]).logits.softmax(-1)
    student = model(input_ids=chunks[:2]).logits.log_softmax(-1)
    expected = (teacher * (teacher.log() - student)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert loss > 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_distill_with_cross_entropy_and_hidden_states(model, chunks):
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=chunks[:2], output_hidden_states=True).hidden_states
    student = model(input_ids=chunks[:2], labels=chunks[:2], output_hidden_states=True)
    distances = [
        ((s - t).square().sum(-1) / t.square().sum(-1)).mean()
        for s, t in zip(student.hidden_states[1:], teacher[1:], strict=True)
    ]
    expected = objectives.distill(model, chunks[:2]) + 0.3 * student.loss + 0.7 * sum(distances) / len(distances)
    assert len(distances) == 2 and min(distances) > 0
    found = objectives.distill(model, chunks[:2], lm_weight=0.3, hidden_weight=0.7)
    torch.testing.assert_close(found, expected)


def test_lm_is_the_loss_of_transformers(model, chunks):
    expected = model(input_ids=chunks[:2], labels=chunks[:2]).loss
    torch.testing.assert_close(objectives.lm(model, chunks[:2]), expected)


def test_attention_is_the_squared_error_of_centred_scores(model, chunks):
    seen = []
    for method in sparse_layers(model):
        method.observer = lambda *call: seen.append(call)
    model(input_ids=chunks[:2])
    expected = []
    for query, key, scores, scaling in seen:
        part = slice(2, 96 - 8 - 64)
        target = (far_attention_mass(query, key, window=8, scaling=scaling) + 1e-6).log()[..., part]
        found = scores[..., part]
        expected.append(F.mse_loss(found - found.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)))
    before = [layer.observer for layer in sparse_layers(model)]
    loss = attention(model, chunks[:2])
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert [layer.observer for layer in sparse_layers(model)] == before
    assert len(seen) == 2  # of the two layers, before it was computed


def test_the_observed_forward_is_dense(model, chunks):
    with torch.no_grad(), model.disable_adapter():
        dense = model(input_ids=chunks[:2]).logits
    for method in sparse_layers(model):
        method.observer = lambda *call: None
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=chunks[:2]).logits, dense, atol=1e-5, rtol=0)


def test_switching_off_restores_on_error(model, chunks):
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), objectives.switched_off(model):
        assert model.config._attn_implementation != NAME
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == NAME
    assert [p.requires_grad for p in model.parameters()] == trainable
