"""Gradient checkpointing of the base: less is kept, nothing else changes."""

import runpy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_sparse import SparseKConfig
from hf_sparse.finetune import FinetuneConfig, checkpoint, finetune
from hf_sparse.finetune.objectives import OBJECTIVES
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
CAUSAL = [
    pytest.param(name, marks=pytest.mark.full if entry.kin else ()) for name, entry in FAMILIES.items() if entry.causal
]
SHORT = {"steps": 4, "warm_start_steps": 2, "batch_size": 2, "warmup_steps": 1, "progress": False}


def soft(model):
    model.eval()
    for method in sparse_layers(model):
        method.train()
    return model


def scorers(model):
    return {name: p for name, p in model.named_parameters() if "sparsek_scorer" in name}


def run(model, chunks, held, again, **weights):
    """Loss, gradients and how much is kept between forward and backward."""
    model.zero_grad()
    with held(model) as count, recomputed(model) if again else nullcontext():
        loss = OBJECTIVES["causal"]["distill"](model, chunks, **weights)
    kept = count()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in scorers(model).items()}, kept


@pytest.mark.cross("values")
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("weights", [{}, {"lm_weight": 0.5, "hidden_weight": 0.5}], ids=["plain", "mixed"])
def test_the_same_loss_and_gradients_for_less_memory(held, family, weights):
    model = soft(get_peft_model(FAMILIES[family].make(), SparseKConfig(k=6, window=8, sinks=2)))
    chunks = torch.randint(5, 64, (2, 64))
    loss, gradients, memory = run(model, chunks, held, False, **weights)
    again, repeated, less = run(model, chunks, held, True, **weights)
    assert torch.equal(loss, again)
    assert gradients.keys() == repeated.keys() and all(g.any() for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(repeated[name], gradient, rtol=1e-6, atol=1e-9)
    assert less < 0.6 * memory  # of two to four narrow layers


def test_the_layers_are_as_before(sparse_llama, chunks):
    model = sparse_llama()
    layers = model.get_base_model().model.layers
    own = layers[0].forward
    layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate does for offloaded weights
    wrapped = layers[0].forward
    with pytest.raises(RuntimeError, match="on purpose"), recomputed(model):
        raise RuntimeError("on purpose")
    assert layers[0].forward is wrapped and "forward" not in layers[1].__dict__


def test_nothing_to_run_again():
    with (
        pytest.raises(ValueError, match=r"gradient_checkpointing needs layers .* got a Linear"),
        recomputed(nn.Linear(1, 1)),
    ):
        pass


def train(model, chunks, **changes):
    return finetune(model, chunks, FinetuneConfig(**{**SHORT, **changes}))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_is_the_same_and_resumes_exactly(monkeypatch, sparse_llama, chunks, tmp_path):
    plain, whole = sparse_llama(), sparse_llama()
    train(plain, chunks)
    metrics = train(whole, chunks, gradient_checkpointing=True)
    assert metrics["gradient_checkpointing"] and same(scorers(whole), scorers(plain))

    class Stopped(Exception):
        pass

    real = checkpoint.save

    def save_and_stop(output, step, *args):
        real(output, step, *args)
        if step == 4:
            raise Stopped

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    placed = {"output_dir": str(tmp_path), "checkpoint_every": 1}
    with pytest.raises(Stopped):
        train(sparse_llama(), chunks, gradient_checkpointing=True, **placed)
    monkeypatch.undo()
    resumed = sparse_llama()  # with or without: the result does not depend on it
    train(resumed, chunks, resume=True, **placed)
    assert same(scorers(resumed), scorers(whole))
