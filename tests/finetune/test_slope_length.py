"""A run on an adapter that has learned no slope gives the slopes a length, and a resumed run goes on with the same."""

import json

import pytest
import torch
from peft import get_peft_model

from hf_sparse import SparseKConfig
from hf_sparse.finetune import FinetuneConfig, checkpoint, estimate, finetune
from hf_sparse.finetune.loop import adapter_tensors
from hf_sparse.patches import sparse_layers

SETTINGS = {"steps": 5, "warm_start_steps": 1, "batch_size": 2, "warmup_steps": 1, "divide_heads": False, "cpu": True}


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    monkeypatch.setattr("hf_sparse.methods.sparsek.training._MANY", 6)


def train(model, chunks, **changes):
    return finetune(model, chunks, FinetuneConfig(**{**SETTINGS, "progress": False, **changes}))


def length_of(model):
    return sparse_layers(model)[0].config.slope_length


def weights_of(model):
    return [tensor.detach().clone() for layer in sparse_layers(model) for tensor in adapter_tensors(layer).values()]


def same(model, other):
    return length_of(model) == length_of(other) and all(
        torch.equal(one, two) for one, two in zip(weights_of(model), weights_of(other), strict=True)
    )


def test_an_adapter_without_slopes_gets_a_length(sparse_llama, chunks, capfd):
    open_, given = sparse_llama(), sparse_llama(slope_length=1024)
    metrics = train(open_, chunks, progress=True)
    assert metrics["slopes"] == {"length": 1024}
    assert "chunks of 96 tokens at a time. Slopes grow by the logarithm of positions after 1,024 tokens" in (
        capfd.readouterr().err
    )
    assert "slopes" not in train(given, chunks)
    assert length_of(open_) == 1024 and same(open_, given)


@pytest.mark.parametrize(
    "settings",
    [{"slope_length": 0}, {"position_slope": 0.01}, {"learn_slope": False}, {"slope_length": 64}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_the_configuration_says_stays(sparse_llama, chunks, settings):
    model = sparse_llama(**settings)
    assert "slopes" not in train(model, chunks)
    assert length_of(model) == settings.get("slope_length")


def test_few_selected_keys_keep_no_facts_of_long_texts(sparse_llama, chunks):
    model = sparse_llama(k=5)
    assert "slopes" not in train(model, chunks) and length_of(model) is None


def test_slopes_that_were_learned_stay_as_they_are(sparse_llama, chunks):
    model = sparse_llama()
    with torch.no_grad():
        sparse_layers(model)[1].sparsek_scorer["default"].slope[1] = 0.1
    assert "slopes" not in train(model, chunks) and length_of(model) is None


def test_an_encoder_has_no_slopes(tiny_bert, chunks):
    model = get_peft_model(tiny_bert(), SparseKConfig(k=6, window=8, sinks=2))
    hidden = {"input_ids": chunks, "labels": chunks.where(chunks % 5 == 0, -100)}
    assert "slopes" not in train(model, hidden) and length_of(model) is None


def test_steps_on_trial_leave_it_open(sparse_llama, chunks):
    model = sparse_llama()
    estimate(model, chunks, FinetuneConfig(**SETTINGS))
    assert length_of(model) is None and same(model, sparse_llama())


def test_a_resumed_run_is_the_run_and_can_be_repeated(sparse_llama, chunks, stopped, tmp_path):
    whole, model, place = sparse_llama(), sparse_llama(), {"output_dir": str(tmp_path)}
    train(whole, chunks)
    with stopped(3):
        train(sparse_llama(), chunks, **place, checkpoint_every=1)
    for _ in range(2):
        assert train(model, chunks, **place, resume=True)["slopes"] == {"length": 1024}
        assert same(model, whole)
    with pytest.raises(ValueError, match="different: adapter"):
        train(sparse_llama(slope_length=64), chunks, **place, resume=True)


def test_a_checkpoint_from_before_lengths_goes_on_without(sparse_llama, chunks, stopped, tmp_path, capfd):
    whole, model, place = sparse_llama(slope_length=0), sparse_llama(), {"output_dir": str(tmp_path)}
    train(whole, chunks)
    with stopped(3):
        train(sparse_llama(slope_length=0), chunks, **place, checkpoint_every=1)
    path = checkpoint.latest(tmp_path) / "state.json"
    state = json.loads(path.read_text())
    del state["settings"]["adapter"]["slope_length"], state["sha256"]
    path.write_text(json.dumps(state | {"sha256": checkpoint._state_sha256(state)}))
    capfd.readouterr()
    assert "slopes" not in train(model, chunks, **place, resume=True, progress=True)
    assert "Slopes" not in capfd.readouterr().err
    assert length_of(model) is None and not any(
        (one - two).any() for one, two in zip(weights_of(model), weights_of(whole), strict=True)
    )
