"""The selected keys are divided among the KV heads in the middle of a run, and a resumed run goes on with the same."""

import json
import time
import warnings

import pytest
import torch

import hf_sparse
from hf_sparse.finetune import FinetuneConfig, estimate, finetune
from hf_sparse.methods.sparsek import SparseKConfig
from hf_sparse.methods.sparsek.evaluation import divide_heads
from hf_sparse.methods.sparsek.training import SparseKTraining
from hf_sparse.patches import sparse_layers
from hf_sparse.workflow import create_adapter, train_adapter

SETTINGS = {
    "divide_heads": True,
    "steps": 10,
    "warm_start_steps": 1,
    "batch_size": 2,
    "warmup_steps": 1,
    "cpu": True,
}


def train(model, chunks, **changes):
    return finetune(model, chunks, FinetuneConfig(**{**SETTINGS, "progress": False, **changes}))


def outcome(model):
    scorers = {name: p.detach().clone() for name, p in model.named_parameters() if "sparsek_scorer" in name}
    return scorers, sparse_layers(model)[0].config.head_shares


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


def test_heads_that_lose_more_get_more(sparse_llama, chunks, capfd):
    model = sparse_llama()
    metrics = train(model, chunks, progress=True)
    shares = sparse_layers(model)[0].config.head_shares
    flat = [share for row in shares for share in row]
    assert metrics["division"]["head_shares"] == shares and metrics["division"]["chunks"] == 4
    assert sum(flat) == pytest.approx(4, abs=1e-3) and len({round(share, 2) for share in flat}) > 1
    few = metrics["division"]["damages"]["3"]
    assert flat[few.index(max(few))] > flat[few.index(min(few))]
    assert all(layer.budget.per_head(2) != (6, 6) for layer in sparse_layers(model))
    assert [row["stage"] for row in metrics["history"]] == ["attention", *["distill"] * 10]
    assert SparseKConfig(k=6, head_shares=shares).head_shares == shares  # they can be saved
    said = capfd.readouterr().err
    assert "scorers: 1 steps of attention, then 2 steps of distill, then 8 steps of distill; 2 of 12 chunks" in said
    assert (
        "Before the last 8 steps of distill, the 6 of 16 slots that hold selected keys are divided among the 4 KV heads"
        in said
    )


def test_heads_are_measured_on_the_first_tokens_of_long_chunks(sparse_llama, chunks, monkeypatch):
    lengths = []

    def divide(model, measured, **options):
        lengths.append(measured.shape[1])
        return divide_heads(model, measured, **options)

    monkeypatch.setattr("hf_sparse.methods.sparsek.evaluation.divide_heads", divide)
    monkeypatch.setattr("hf_sparse.methods.sparsek.training._TOKENS", 40)
    train(sparse_llama(), chunks, steps=5)
    monkeypatch.setattr("hf_sparse.methods.sparsek.training._TOKENS", 20)  # too few beside 16 slots
    train(sparse_llama(), chunks, steps=5)
    assert lengths == [40, chunks.shape[1]]


# Before, at and after the division, which is after step 3; the repeated run below begins before it.
@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.full), 3, 6])
def test_a_resumed_run_is_the_run(sparse_llama, chunks, stopped, tmp_path, step):
    whole, first, second = sparse_llama(), sparse_llama(), sparse_llama()
    train(whole, chunks)
    place = {"output_dir": str(tmp_path), "checkpoint_every": 1}
    with stopped(step):
        train(first, chunks, **place)
    metrics = train(second, chunks, **place, resume=True)
    assert same(outcome(second), outcome(whole)) and metrics["division"]["head_shares"] == outcome(whole)[1]


def test_steps_on_trial_leave_the_heads_equal(sparse_llama, chunks):
    model = sparse_llama()
    before = outcome(model)
    told = estimate(model, chunks, FinetuneConfig(**SETTINGS))
    assert told["steps"] == 11 and same(outcome(model), before) and before[1] is None


@pytest.mark.parametrize("step", [2, 6])  # its last checkpoint is from before the division, or from after it
def test_a_run_that_ended_can_be_repeated(sparse_llama, chunks, stopped, tmp_path, step):
    model, place = sparse_llama(), {"output_dir": str(tmp_path)}
    with stopped(step):
        train(sparse_llama(), chunks, **place, checkpoint_every=1)
    train(model, chunks, **place, resume=True)
    expected = outcome(model)
    metrics = train(model, chunks, **place, resume=True)
    assert same(outcome(model), expected) and metrics["division"]["head_shares"] == expected[1]
    with pytest.raises(ValueError, match="cannot resume with other settings than the checkpoint's"):
        train(model, chunks, **place, resume=True, divide_heads=False)
    assert same(outcome(model), expected)


def test_a_later_run_on_the_same_adapter_can_be_resumed(sparse_llama, chunks, stopped, tmp_path):
    model = sparse_llama()
    place = {"output_dir": str(tmp_path), "checkpoint_every": 2}
    train(model, chunks, **place)
    scorers, shares = outcome(model)
    with stopped(4):
        train(model, chunks, **place)
    with torch.no_grad():  # as the folder still holds them
        for name, parameter in model.named_parameters():
            if name in scorers:
                parameter.copy_(scorers[name])
    metrics = train(model, chunks, **place, resume=True)
    assert "division" not in metrics and sparse_layers(model)[0].config.head_shares == shares


def test_steps_on_trial_leave_the_shares_of_a_run_that_would_be_repeated(sparse_llama, chunks, stopped, tmp_path):
    model, config = sparse_llama(), {"output_dir": str(tmp_path), "checkpoint_every": 2}
    train(model, chunks, **config)
    before = outcome(model)
    estimate(model, chunks, FinetuneConfig(**SETTINGS, **config, resume=True))
    assert same(outcome(model), before) and before[1] is not None


def test_heads_that_select_all_keys_have_not_collapsed(sparse_llama, chunks):
    model = sparse_llama(head_shares=[[3.7, 0.1], [0.1, 0.1]], k=60)  # 222 keys for a head, and 86 compete
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = train(model, chunks)["history"]
    assert history[-1]["support"] < 60


def test_measuring_holds_no_logits_of_a_whole_text(sparse_llama, chunks, monkeypatch):
    model, shapes = sparse_llama(), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: shapes.append(logits.shape))
    monkeypatch.setattr("hf_sparse.methods.sparsek.evaluation.damages._SLICE", 16)
    divide_heads(model, chunks[:2], batch_size=2, progress=False)
    assert max(shape[1] for shape in shapes) == 16


@pytest.mark.parametrize(
    ("adapter", "recipe"),
    [
        ({"layer_shares": [1.5, 0.5]}, {}),
        ({"pin_prompt": -1}, {}),
        ({"k": 1}, {}),
        ({}, {"steps": 4}),
        ({}, {"divide_heads": False}),
        ({}, {"objective": "attention"}),
    ],
)
def test_nothing_is_divided(sparse_llama, chunks, adapter, recipe):
    model = sparse_llama(**adapter)
    metrics = train(model, chunks, **recipe)
    assert "division" not in metrics and "divide_heads" not in metrics["settings"]
    assert sparse_layers(model)[0].config.head_shares is None


def test_shares_that_an_adapter_has_stay(sparse_llama, chunks):
    shares = [[0.5, 1.5], [1.0, 1.0]]
    model = sparse_llama(head_shares=shares)
    train(model, chunks)
    assert sparse_layers(model)[0].config.head_shares == shares


def test_pinned_tokens_fit_into_every_head(sparse_llama, chunks):
    model = sparse_llama(pin_prompt=5)
    train(model, chunks)
    assert all(layer.budget.fewest_slots >= 5 + 1 + 8 for layer in sparse_layers(model))


def test_the_folder_has_the_shares(tmp_path):
    folder = tmp_path / "adapter"
    create_adapter("demo", SparseKConfig(k=12, window=8, sinks=2, layers=[0, 7]), folder, dtype="float32")
    text = " ".join(f"def f{n}(x): return x + {n}" for n in range(60))
    settings = FinetuneConfig(divide_heads=True, steps=5, warm_start_steps=0, batch_size=1, progress=False)
    metrics = train_adapter(folder, text, settings, length=64, chunks="0:2", device="cpu")
    shares = json.loads((folder / "adapter_config.json").read_text())["head_shares"]
    assert shares == metrics["division"]["head_shares"] and shares[1] == [1.0, 1.0] != shares[0]
    model = hf_sparse.from_pretrained(str(folder))
    assert sparse_layers(model)[0].budget.per_head(2) != (12, 12)


def test_an_estimate_counts_the_time_of_dividing(sparse_llama, chunks, monkeypatch):
    monkeypatch.setattr(SparseKTraining, "_divide", lambda training: time.sleep(2))
    assert estimate(sparse_llama(), chunks, FinetuneConfig(**SETTINGS))["seconds"] > 2
