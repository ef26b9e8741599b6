"""A training step that was recorded has the loss and the gradients of one that runs.

Without a GPU a recording is imitated: playing it computes again, into the same tensors.
"""

from contextlib import nullcontext

import pytest
import torch

from hf_sparse.finetune import objectives, recorded_loss
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.recorded_steps import calls_nothing_else

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model(sparse_llama):
    return sparse_llama(lora_rank=2).eval().to(DEVICE)


@pytest.fixture
def played(monkeypatch):
    """List a 1 for every step that is played, the one included that is compared with a step that runs."""
    played: list[int] = []
    record = recorded_loss.record if DEVICE == "cuda" else imitated

    def counting(call, device):
        results, replay = record(call, device)
        return results, lambda: (played.append(1), replay())

    monkeypatch.setattr(recorded_loss, "record", counting)
    if DEVICE == "cpu":
        monkeypatch.setattr(recorded_loss, "_is_on_gpu", lambda chunks: True)
        monkeypatch.setattr(recorded_loss, "_has_room", lambda device: True)
        monkeypatch.setattr(recorded_loss, "is_small", lambda base, weights, chunks: calls_nothing_else(base))
    return played


def imitated(call, device):
    results = call()

    def replay():
        for result, new in zip(results, call(), strict=True):
            result.copy_(new)

    return results, replay


def gradients(model, loss):
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def plain(model, chunks, lm_weight=0.0, hidden_weight=0.0):
    return objectives._distill(model, chunks, lm_weight, hidden_weight)


def soft(model):
    for layer in sparse_layers(model):
        layer.train()
    return model


@pytest.mark.parametrize("mixture", [{}, {"lm_weight": 0.5}], ids=["distill", "mixture"])
def test_losses_and_gradients_are_those_of_steps_that_run(model, chunks, played, mixture):
    """Compare them for other chunks and for weights that changed in place; they scale with what comes from above."""
    soft(model)
    rows = chunks.to(DEVICE).split(2)
    for number in range(6):
        loss = objectives.distill(model, rows[number], **mixture)
        expected = plain(model, rows[number], **mixture)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        pairs = zip(gradients(model, 3 * loss), gradients(model, 3 * expected), strict=True)
        for gradient, of_plain in pairs:
            torch.testing.assert_close(gradient, of_plain, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
    assert len(played) == 5
    assert any(module in recorded_loss._recordings for module in model.modules())
    recorded_loss.forget(model)
    assert not any(module in recorded_loss._recordings for module in model.modules())


def test_losses_of_two_batches_before_one_backward(model, chunks, played):
    rows = chunks.to(DEVICE).split(2)
    soft(model)
    for _ in range(3):
        losses = [objectives.distill(model, part) for part in rows[:2]]
    assert len(played) == 5
    expected = plain(model, rows[0]) + 2 * plain(model, rows[1])
    for gradient, of_plain in zip(gradients(model, losses[0] + 2 * losses[1]), gradients(model, expected), strict=True):
        torch.testing.assert_close(gradient, of_plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", ["hook", "observer", "shape", "no gradient"])
def test_what_a_recording_would_miss_runs(model, chunks, played, change):
    soft(model)
    chunks = chunks.to(DEVICE)
    for _ in range(3):
        objectives.distill(model, chunks[:2])
    assert len(played) == 2
    calls = []
    layer = sparse_layers(model)[0]
    if change == "hook":
        layer.sparsek_scorer[layer.active].register_forward_hook(lambda *_: calls.append(1))
        objectives.distill(model, chunks[:2])
        assert calls
    elif change == "observer":
        layer.observer = lambda *_: calls.append(1)
        objectives.distill(model, chunks[:2])
        assert calls
    elif change == "shape":
        loss = objectives.distill(model, chunks[:3])
        torch.testing.assert_close(loss, plain(model, chunks[:3]))
    else:
        with torch.no_grad():
            assert not objectives.distill(model, chunks[:2]).requires_grad
    assert len(played) == 2


def test_a_recording_that_plays_another_step_is_not_used(model, chunks, played, monkeypatch):
    """As one would that reads memory which was freed."""
    soft(model)
    chunks = chunks.to(DEVICE)
    record = recorded_loss.record

    def wrong(call, device):
        results, replay = record(call, device)
        return results, lambda: (replay(), results[1].mul_(1.1))

    monkeypatch.setattr(recorded_loss, "record", wrong)
    for _ in range(2):
        objectives.distill(model, chunks[:2])
    with pytest.warns(UserWarning, match="differs from one that ran, so all steps run"):
        loss = objectives.distill(model, chunks[:2])
    torch.testing.assert_close(loss, plain(model, chunks[:2]))
    objectives.distill(model, chunks[:2])
    assert len(played) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="it imitates a recording")
@pytest.mark.parametrize(("error", "is_played"), [(0.05, True), (0.5, False)], ids=["as far as runs", "further"])
def test_a_recording_may_differ_as_far_as_steps_that_run_do(model, chunks, played, monkeypatch, error, is_played):
    def noisy(call, device):
        results = call()

        def replay():
            for result, new in zip(results, call(), strict=True):
                result.copy_(new * (1 + error))

        return results, replay

    number = 0
    compute = objectives._distill

    def drifting(*args, **settings):
        nonlocal number
        number += 1
        return compute(*args, **settings) * (1 + 0.04 * (number % 2))

    soft(model)
    monkeypatch.setattr(recorded_loss, "record", noisy)
    monkeypatch.setattr(objectives, "_distill", drifting)
    context = nullcontext() if is_played else pytest.warns(UserWarning, match="differs from one that ran")
    with context:
        for _ in range(3):
            objectives.distill(model, chunks[:2])
    assert (recorded_loss._recordings[model.get_base_model()].replay is not None) == is_played
