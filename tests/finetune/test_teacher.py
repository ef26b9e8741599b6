"""A teacher that was recorded predicts what one that runs predicts; where nothing can be recorded it runs."""

import pytest
import torch

from hf_sparse.finetune import objectives, teacher
from hf_sparse.finetune.predictions import predict
from hf_sparse.patches import sparse_layers

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@pytest.fixture
def model(sparse_llama):
    return sparse_llama().eval().to("cuda" if torch.cuda.is_available() else "cpu")


def dense(model, tokens, **options):
    """The states of the recorded teacher, and those of the model as it runs."""
    with torch.no_grad(), objectives.switched_off(model):
        found = teacher.predict_dense(model, tokens, **options)
        expected = predict(model, tokens, **options)
    return found, expected


@on_a_gpu
def test_replays_predict_the_same(model, chunks):
    """Compare every input, with hidden states too; another layout and moved weights are recorded anew."""
    rows = chunks.to("cuda").split(2)
    for number in range(8):
        found, expected = dense(model, rows[number % len(rows)], use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(found.states, expected.states, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logits(found.states), expected.logits(expected.states), rtol=1e-5, atol=1e-5)
    assert len(teacher._teachers) == 1 and next(iter(teacher._teachers.values())).replay is not None
    for parameter in model.parameters():  # in new memory, with other values
        parameter.data = parameter.data * 1.5
    found, expected = dense(model, rows[0], use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(found.states, expected.states, rtol=1e-5, atol=1e-5)
    teacher.forget(model)
    assert not teacher._teachers


@on_a_gpu
def test_the_loss_of_every_step_is_that_without_a_recording(model, chunks, monkeypatch):
    for layer in sparse_layers(model):
        layer.train()
    rows = chunks.to("cuda").split(2)
    recorded = [objectives.distill(model, rows[number % len(rows)]) for number in range(6)]
    monkeypatch.setattr(objectives, "predict_dense", predict)
    plain = [objectives.distill(model, rows[number % len(rows)]) for number in range(6)]
    torch.testing.assert_close(torch.stack(recorded), torch.stack(plain), rtol=1e-5, atol=1e-6)


@on_a_gpu
def test_a_forward_that_waits_for_the_device_runs_as_ever(model, chunks):
    def wait(module, args):
        args[0].sum().item()

    handle = model.get_input_embeddings().register_forward_pre_hook(wait)
    for _ in range(5):
        found, expected = dense(model, chunks[:2].to("cuda"), use_cache=False)
        torch.testing.assert_close(found.states, expected.states, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert all(one.replay is None for one in teacher._teachers.values())


def test_elsewhere_it_runs(model, chunks):
    """On the CPU, and in autocast."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        for _ in range(4):
            found, expected = dense(model, chunks[:2].to(model.device), use_cache=False)
            assert torch.equal(found.states, expected.states)
    assert not [one for one in teacher._teachers.values() if one.replay is not None]
