"""Every step is noted as it is taken; what goes wrong is said early, and what a run takes before its first step."""

import json
import sys
import warnings

import accelerate.tracking
import pytest
import torch

from hf_sparse.finetune import FinetuneConfig, estimate, finetune, optimiser_step
from hf_sparse.finetune.peak import share_of_peak
from hf_sparse.finetune.stages import training_of

SHORT = {"steps": 6, "warm_start_steps": 2, "batch_size": 2, "warmup_steps": 1, "progress": False, "cpu": True}


def train(model, chunks, **changes):
    return finetune(model, chunks, FinetuneConfig(**{**SHORT, **changes}))


def lines(folder):
    return [json.loads(line) for line in (folder / "finetune.jsonl").read_text().splitlines()]


def test_a_line_for_every_step_of_a_resumed_run(sparse_llama, chunks, tmp_path, stopped):
    with stopped(5):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), checkpoint_every=5)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]
    with (tmp_path / "finetune.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # of a run that was killed
    history = train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True)["history"]
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]
    assert all(row["gradient_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("changes, message", [({}, "scores have collapsed"), ({"final_scale": 8.0}, None)])
def test_scores_that_collapse_are_told_once(sparse_llama, chunks, changes, message):
    model = sparse_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sparsek_scorer" in name:
                parameter.mul_(1e4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(model, chunks, warm_start_steps=0, **changes)
    assert sum("scores have collapsed" in str(warning.message) for warning in told) == (1 if message else 0)


@pytest.mark.parametrize("k, support, collapsed", [(508, 551.0, False), (24, 28.1, False), (24, 24.5, True)])
def test_runs_that_learned_well_are_not_told_to_have_collapsed(sparse_llama, k, support, collapsed):
    """The last steps of a Qwen2.5 of 1.5B and of a MiniLM; and gates of which next to none is between 0 and 1."""
    training = training_of(sparse_llama(k=k), FinetuneConfig(**SHORT))
    problem = training.problem(training.stages[-1], {"support": support})
    assert ("the scores have collapsed" in problem) if collapsed else problem is None


def test_gradients_that_vanish_are_told(sparse_llama, chunks, monkeypatch):
    clip, calls = optimiser_step._clip, []
    monkeypatch.setattr(
        optimiser_step,
        "_clip",
        lambda run: calls.append(1) or [n * (1e-9 if len(calls) == 5 else 1) for n in clip(run)],
    )
    with pytest.warns(UserWarning, match=r"step 5 \(distill\): the gradient has vanished"):
        train(sparse_llama(), chunks)


def test_the_share_of_the_peak(sparse_llama):
    """One GPU at its peak would do two operations per weight, token and pass; embeddings are looked up."""
    model = sparse_llama()
    looked_up = model.get_base_model().get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - looked_up
    speed = 0.5 * 989e12 / (2 * weights)
    half = {"mixed_precision": "bf16"}
    assert share_of_peak(model, "attention", speed, "NVIDIA H200", **half) == pytest.approx(0.5)
    assert share_of_peak(model, "distill", speed, "NVIDIA H100 80GB HBM3", **half) == pytest.approx(1.5)
    assert share_of_peak(model, "lm", speed, "NVIDIA H200") is None  # the weights are float32
    assert share_of_peak(model, "lm", speed, "Another", **half) is None


def test_a_tracker_of_accelerate(sparse_llama, chunks, monkeypatch, stopped, tmp_path):
    seen = []

    class Tracker(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "trackio", False, None

        def __init__(self, run_name, **options):
            super().__init__()

        def store_init_configuration(self, values):
            seen.append(values["steps"])

        def log(self, values, step=None, **options):
            seen.append((step, values["loss"]))

        def finish(self):
            seen.append("finished")

    with pytest.raises(ValueError, match="the tracker 'trackio' is not installed"):
        train(sparse_llama(), chunks, tracker="trackio")
    with pytest.raises(ValueError, match=r"tracker must be one of .*tensorboard.*, got 'paper'"):
        train(sparse_llama(), chunks, tracker="paper")
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.tracking.LoggerType("trackio")])
    history = train(sparse_llama(), chunks, tracker="trackio")["history"]
    assert seen == [6, *((row["step"], row["loss"]) for row in history), "finished"]
    with stopped(2):  # a tracker that goes on would take the next run for the same one
        train(sparse_llama(), chunks, tracker="trackio", output_dir=str(tmp_path), checkpoint_every=1)
    assert [row if isinstance(row, str) else row[0] for row in seen[-3:]] == [1, 2, "finished"]


def test_an_estimate_where_the_system_does_not_tell_the_memory(sparse_llama, chunks, monkeypatch):
    """On Windows Python has no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    told = estimate(sparse_llama(), chunks, FinetuneConfig(**SHORT))
    assert told["steps"] == 8 and told["peak_memory_bytes"] is None


def test_an_estimate_leaves_all_as_it_was(sparse_llama, chunks, tmp_path):
    model = sparse_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = FinetuneConfig(**{**SHORT, "steps": 100}, output_dir=str(tmp_path / "run"), checkpoint_every=1)
    told = estimate(model, chunks, config)
    assert told["steps"] == 102 and told["tokens"] == 102 * 2 * 96
    assert (
        told["seconds"] == pytest.approx(told["tokens"] / told["tokens_per_second"]) and told["peak_memory_bytes"] > 1e6
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "run").exists()
