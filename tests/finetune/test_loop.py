"""The loop: what changes, what does not, what it writes, and that a resumed run is the run."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import accelerate
import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_sparse.finetune.objectives as objectives
import hf_sparse.methods.sparsek.training
from hf_sparse import patch
from hf_sparse.errors import DataError
from hf_sparse.finetune import FinetuneConfig, checkpoint, finetune
from hf_sparse.finetune.order import ShuffledRows
from hf_sparse.methods.sparsek import SparseKConfig
from hf_sparse.ops import sparsek
from hf_sparse.patches import sparse_layers

SHORT = {"steps": 6, "warm_start_steps": 3, "batch_size": 2, "warmup_steps": 1, "progress": False}
FEW = {"steps": 2, "warm_start_steps": 1}  # where every step shows what is tested

RUN = """
import hf_sparse
from hf_sparse.finetune import FinetuneConfig, finetune
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

model = hf_sparse.from_pretrained("adapter", base_model="base", is_trainable=True)
settings = {"steps": 40, "warm_start_steps": 3, "batch_size": 2, "warmup_steps": 1, "progress": False}
config = FinetuneConfig(**settings, output_dir="run", checkpoint_every=1, resume=True)
finetune(model, load_file("chunks.safetensors")["chunks"], config)
scorers = {name: p.detach() for name, p in model.named_parameters() if "sparsek_scorer" in name}
save_file(scorers, "final.safetensors")
"""


def scorers(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "sparsek_scorer" in name}


def train(model, chunks, **changes):
    return finetune(model, chunks, FinetuneConfig(**{**SHORT, **changes}))


def rewrite(folder, **changes):
    """Change the state of a checkpoint as a run with such a state would have written it."""
    content = json.loads((folder / "state.json").read_text()) | changes
    del content["sha256"]
    (folder / "state.json").write_text(json.dumps({**content, "sha256": checkpoint._state_sha256(content)}))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("objective", ["distill", "attention", "lm"])
def test_scorers_change_and_nothing_else(sparse_llama, chunks, objective):
    model = sparse_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = train(model, chunks, objective=objective)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("sparsek_scorer" in name), name
    assert not model.training and not any(method.training for method in sparse_layers(model))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert metrics["trainable_parameters"] == sum(p.numel() for p in scorers(model).values()) == 2 * 2 * (32 + 1)


@pytest.mark.parametrize(
    ("objective", "rate"), [("distill", 5e-2), pytest.param("attention", 5e-2, marks=pytest.mark.full)]
)
def test_the_loss_falls(sparse_llama, chunks, objective, rate):
    metrics = train(
        sparse_llama(), chunks, objective=objective, steps=25, warm_start_steps=0, batch_size=12, learning_rate=rate
    )
    losses = [row["loss"] for row in metrics["history"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_gates_of_all_heads_are_measured_together(monkeypatch):
    """Each projection is about a thousand launches, an 8B model has 256 KV heads, and heads may differ in all."""
    module = hf_sparse.methods.sparsek.training
    calls = []
    monkeypatch.setattr(module, "sparsek", lambda scores, k: calls.append(len(k)) or sparsek(scores, k))
    heads = [(3, 12, 40), (5, 20, 40), (3, 12, 40), (7, None, 40), (60, 240, 40), (5, 20, 33)]
    competing = [module._Competing(k, bound, torch.randn(2, length)) for k, bound, length in heads]
    best = [one.scores.topk(min(one.bound or 40, one.scores.shape[-1])).values for one in competing]
    spread = [(sparsek(scores, one.k) > 0).sum(-1) for scores, one in zip(best, competing, strict=True)]
    assert module._mean_support(competing) == pytest.approx(float(torch.cat(spread).float().mean()))
    assert calls == [10, 2]


def test_layers_that_accelerate_placed(sparse_llama, chunks):
    """As `device_map` leaves them: hooks take tensors to the device of each module, and nothing is moved as a whole."""
    whole, placed = sparse_llama(), sparse_llama()
    base = placed.get_base_model()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{number}": "cpu" for number in range(len(base.model.layers))}
    accelerate.dispatch_model(base, places, main_device="cpu", force_hooks=True)
    assert len(base.hf_device_map) > 1 and base.lm_head._hf_hook.execution_device == "cpu"
    losses = [[row["loss"] for row in train(model, chunks, **FEW)["history"]] for model in (whole, placed)]
    assert losses[0] == losses[1] and same(scorers(whole), scorers(placed))
    train(placed, chunks, gradient_checkpointing=True, **FEW)


def test_metrics(sparse_llama, chunks, tmp_path):
    metrics = train(sparse_llama(), chunks, output_dir=str(tmp_path), divide_heads=False)  # one stage of distill
    assert json.loads((tmp_path / "finetune.json").read_text()) == metrics
    assert [row["step"] for row in metrics["history"]] == list(range(1, 10))
    assert [row["stage"] for row in metrics["history"]] == ["attention"] * 3 + ["distill"] * 6
    assert metrics["tokens"] == 9 * 2 * 96
    support = [row["support"] for row in metrics["history"] if row["stage"] == "distill"]
    assert len(support) == 6 and all(6 <= size <= 24 for size in support)  # from k to the bound of 4 k
    assert metrics["history"][0]["learning_rate"] == 2e-2  # one step of warm-up in each stage
    assert metrics["history"][-1]["learning_rate"] == pytest.approx(2e-2 / 5)
    assert sorted(os.listdir(tmp_path)) == ["finetune.json", "finetune.jsonl"]


def test_seed_decides(sparse_llama, chunks):
    runs = []
    for seed in (0, 0, 1):
        model = sparse_llama()
        train(model, chunks, seed=seed, **FEW)
        runs.append(scorers(model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_accumulation_is_a_larger_batch(sparse_llama, chunks):
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        model, settings = sparse_llama(), {"batch_size": batch, "gradient_accumulation_steps": accumulation, "steps": 3}
        history = train(model, chunks, **settings)["history"]
        runs.append((scorers(model), [row["loss"] for row in history]))
    for weights, losses in runs[1:]:
        torch.testing.assert_close(losses, runs[0][1], rtol=1e-5, atol=1e-6)
        for name in weights:
            torch.testing.assert_close(weights[name], runs[0][0][name], rtol=1e-4, atol=1e-5)


def test_scores_are_multiplied_while_training_and_not_afterwards(monkeypatch, sparse_llama, chunks):
    """The position's share included, so that the order of the keys is the same at every scale."""
    seen = []
    real = objectives.OBJECTIVES["causal"]["distill"]

    def spy(model, batch, **weights):
        method = sparse_layers(model)[0]
        states = torch.ones(1, 12, 32) * torch.linspace(-1, 1, 32) ** torch.arange(1, 13)[:, None]
        with torch.no_grad():
            seen.append(method.score(states, torch.arange(12)[None]))
        monkeypatch.setattr(method, "score", type(method).score.__get__(method))  # type: ignore[attr-defined]
        return real(model, batch, **weights) * 0 + sum(p.sum() for p in model.parameters() if p.requires_grad) * 1e-9

    monkeypatch.setitem(objectives.OBJECTIVES["causal"], "distill", spy)
    model = sparse_llama(position_slope=0.1)
    metrics = train(model, chunks, warm_start_steps=0, steps=3, final_scale=16.0, learning_rate=1e-12)
    torch.testing.assert_close(seen[1], 4 * seen[0])
    torch.testing.assert_close(seen[2], 16 * seen[0])
    assert [row.get("score_scale", 1) for row in metrics["history"]] == [1, 4, 16]
    scorer = sparse_layers(model)[0].sparsek_scorer["default"]
    assert not scorer._forward_hooks


def test_a_larger_scale_makes_gates_harder(sparse_llama, chunks):
    options = {"warm_start_steps": 0, "steps": 4, "learning_rate": 1e-12}
    plain, scaled = (train(sparse_llama(), chunks, final_scale=scale, **options)["history"] for scale in (1.0, 1000.0))
    assert plain[0]["support"] == scaled[0]["support"]
    assert scaled[-1]["support"] < 7 < plain[-1]["support"]  # k is 6


def test_options_change_what_is_learned(sparse_llama, chunks):
    plain = sparse_llama()
    train(plain, chunks, **FEW)
    for changes in ({"lm_weight": 0.5}, {"hidden_weight": 0.5}, {"final_scale": 8.0}):
        changed = sparse_llama()
        train(changed, chunks, **FEW, **changes)
        assert not same(scorers(plain), scorers(changed)), changes


@pytest.mark.parametrize(("stop", "steps"), [(3, 3), (4, 1)], ids=["end of the warm start", "first of the objective"])
def test_a_stage_begins_without_the_moments_of_another_loss(stopped, sparse_llama, chunks, tmp_path, stop, steps):
    with stopped(stop):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), checkpoint_every=1)
    moments = load_file(tmp_path / "checkpoints" / f"step-{stop:06d}" / "optimizer.safetensors")
    counts = {value.item() for key, value in moments.items() if key.endswith("|step")}
    assert counts == {steps}


def test_every_chunk_is_seen_once_per_epoch_from_any_start():
    whole = ShuffledRows(5, seed=3, start=0)
    first = [index for index, _ in zip(whole, range(15), strict=False)]
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5)) and first[:5] != first[5:10]
    assert [index for index, _ in zip(ShuffledRows(5, 3, start=7), range(8), strict=False)] == first[7:]


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(1, id="warm start", marks=pytest.mark.full),
        pytest.param(3, id="stage boundary"),
        pytest.param(5, id="middle"),
        pytest.param(9, id="end", marks=pytest.mark.full),
    ],
)
def test_resumed_run_equals_uninterrupted(stopped, sparse_llama, chunks, tmp_path, stop):
    whole = sparse_llama()
    expected = train(whole, chunks)["history"]

    with stopped(stop):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), checkpoint_every=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{stop:06d}"]
    resumed = sparse_llama()
    history = train(resumed, chunks, output_dir=str(tmp_path), resume=True)["history"]
    assert same(scorers(resumed), scorers(whole))
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]


@pytest.mark.full
def test_killed_process_resumes_to_the_same_weights(sparse_llama, chunks, tmp_path, hub_env):
    """The same with a real kill, at whatever step it lands."""
    model = sparse_llama()
    sparse_llama().unload().save_pretrained(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    save_file({"chunks": chunks}, tmp_path / "chunks.safetensors")
    (tmp_path / "run.py").write_text(RUN)
    environment = {**hub_env, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = {"args": [sys.executable, "run.py"], "cwd": tmp_path, "env": environment}
    killed = subprocess.Popen(**process, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run(**process, check=True, capture_output=True)
    train(model, chunks, steps=40)
    assert same(load_file(tmp_path / "final.safetensors"), scorers(model))


def test_resume_without_a_checkpoint_starts(sparse_llama, chunks, tmp_path):
    assert len(train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True)["history"]) == 9


def test_a_checkpoint_from_before_a_field_is_that_of_its_default(sparse_llama, chunks, tmp_path):
    whole = train(sparse_llama(), chunks, output_dir=str(tmp_path), checkpoint_every=4)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    settings = json.loads((folder / "state.json").read_text())["settings"]
    adapter = {name: value for name, value in settings["adapter"].items() if name != "slope_length"}
    rewrite(folder, settings=settings | {"adapter": adapter})
    again = train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True)
    assert [row["loss"] for row in again["history"]] == [row["loss"] for row in whole["history"]]
    with pytest.raises(ValueError, match="different: adapter"):
        train(sparse_llama(slope_length=64), chunks, output_dir=str(tmp_path), resume=True)


def test_resume_refuses_the_same_tokens_in_chunks_of_another_length(sparse_llama, chunks, tmp_path):
    whole = train(sparse_llama(), chunks, output_dir=str(tmp_path), checkpoint_every=4)
    with pytest.raises(ValueError, match=r"different: length$"):
        train(sparse_llama(), chunks.reshape(len(chunks) // 2, -1), output_dir=str(tmp_path), resume=True)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    settings = json.loads((folder / "state.json").read_text())["settings"]
    del settings["length"]  # as an older hf-sparse wrote it
    rewrite(folder, settings=settings)
    again = train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True)
    assert [row["loss"] for row in again["history"]] == [row["loss"] for row in whole["history"]]


def test_resume_refuses_other_settings_and_damage(sparse_llama, chunks, tmp_path):
    train(sparse_llama(), chunks, output_dir=str(tmp_path), checkpoint_every=4)
    with pytest.raises(ValueError, match=r"cannot resume with other settings.*learning_rate"):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True, learning_rate=1e-3)
    with pytest.raises(ValueError, match="different: adapter"):
        train(sparse_llama(k=7), chunks, output_dir=str(tmp_path), resume=True)
    with pytest.raises(ValueError, match="different: chunks"):
        train(sparse_llama(), chunks + 1 - 2 * (chunks > 5), output_dir=str(tmp_path), resume=True)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    state = (folder / "state.json").read_text()
    settings = json.loads(state)["settings"]
    rewrite(folder, settings=settings | {"processes": 2})
    with pytest.raises(ValueError, match="different: processes"):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True)
    (folder / "state.json").write_text(state)
    (folder / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="checkpoint step-000008 is damaged"):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match="checkpoint step-000008 is damaged"):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), resume=True)


def test_mixed_precision_trains_and_is_taken_off_again(sparse_llama, chunks):
    model = sparse_llama()
    before = scorers(model)
    train(model, chunks, mixed_precision="bf16", **FEW)
    assert not same(scorers(model), before)
    assert model(input_ids=chunks[:1]).logits.dtype == torch.float32
    train(sparse_llama(), chunks, mixed_precision="no", **FEW)  # another precision in the same process


def test_the_callers_accelerate_is_left_alone(sparse_llama, chunks):
    accelerator = accelerate.Accelerator(mixed_precision="no", cpu=True)
    train(sparse_llama(), chunks, mixed_precision="bf16", **FEW)
    assert accelerator.mixed_precision == accelerate.Accelerator(mixed_precision="no").mixed_precision == "no"


def test_an_interrupted_run_leaves_the_model_usable(monkeypatch, sparse_llama, chunks):
    model = sparse_llama()
    expected = model(input_ids=chunks[:1]).logits

    def interrupt(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_sparse.methods.sparsek.training, "attention", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, chunks, mixed_precision="bf16")
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(input_ids=chunks[:1]).logits, expected)


def test_dataset_of_datasets(sparse_llama, chunks):
    models = [sparse_llama(), sparse_llama()]
    train(models[0], chunks, **FEW)
    train(models[1], datasets.Dataset.from_dict({"input_ids": chunks.tolist()}), **FEW)
    assert same(scorers(models[0]), scorers(models[1]))


def test_model_patched_without_peft(tiny_llama, chunks):
    model = tiny_llama()
    model.requires_grad_(False)
    patch(model, SparseKConfig(k=6, window=8, sinks=2))
    before = scorers(model)
    train(model, chunks, **FEW)
    assert not same(scorers(model), before)


def test_refusals(sparse_llama, tiny_llama, chunks):
    with pytest.raises(DataError, match=r"chunks of 16 tokens cannot train a budget of 16 slots .* no gradient"):
        train(sparse_llama(), chunks[:, :16])
    with pytest.raises(DataError, match=r"tokens must be 0 to 63, got 0 to 64"):
        train(sparse_llama(), chunks.clamp(min=1).where(chunks != 5, 64).where(chunks != 6, 0))
    with pytest.raises(DataError, match=r"expected chunks \[N, T\] of int64 tokens, got torch.int64 \[96\]"):
        train(sparse_llama(), chunks[0])
    with pytest.raises(DataError, match=r"one length .*, got 3 to 96"):
        train(sparse_llama(), datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], chunks[0].tolist()]}))
    for other in (datasets.Dataset.from_dict({"text": ["a"]}), chunks.numpy(), chunks.tolist()):
        with pytest.raises(DataError, match="dataset with `input_ids`"):
            train(sparse_llama(), other)
    with pytest.raises(DataError, match=r"chunks of 60 tokens are too short for the objective .attention., .* 76"):
        train(sparse_llama(), chunks[:, :60])
    with pytest.raises(TypeError, match="expected a FinetuneConfig, got dict"):
        finetune(sparse_llama(), chunks, {"steps": 1})
    with pytest.raises(ValueError, match="no sparse attention"):
        train(tiny_llama(), chunks)
    with pytest.raises(TypeError, match=r"expected a transformers PreTrainedModel .*, got OptimizedModule"):
        train(torch.compile(sparse_llama()), chunks)
    model = sparse_llama()
    with model.disable_adapter(), pytest.raises(ValueError, match="switched on, and that of this model is off"):
        train(model, chunks)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters besides the scorers would be trained, the first is .*lm_head"):
        train(model, chunks)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_does_not_begin(sparse_llama, chunks, tmp_path, mode):
    with mode(), pytest.raises(ValueError, match=r"finetune needs gradients, which torch.no_grad and"):
        train(sparse_llama(), chunks, output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, sparse_llama, chunks):
    monkeypatch.setitem(
        objectives.OBJECTIVES["causal"],
        "distill",
        lambda model, batch, **weights: next(p for p in model.parameters() if p.requires_grad).sum() * torch.nan,
    )
    model = sparse_llama()
    with pytest.raises(ValueError, match=r"step 4 .distill. is nan"):
        train(model, chunks)
    assert all(weights.isfinite().all() for weights in scorers(model).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(sparse_llama, chunks, tmp_path, value):
    options = {"warm_start_steps": 0, "steps": 3, "checkpoint_every": 1}
    good, bad, calls = sparse_llama(), sparse_llama(), []
    with pytest.raises(
        ValueError, match=r"gradient of step 3 .distill. is not finite; the scorers are those of the step"
    ):
        parameter = next(p for name, p in bad.named_parameters() if "sparsek_scorer" in name)
        parameter.register_hook(lambda g: calls.append(g) or (g * value if len(calls) == 3 else g))
        train(bad, chunks, output_dir=str(tmp_path), **options)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "step-000002"
    before = load_file(folder / "parameters.safetensors")
    assert same(scorers(bad), before) and all(p.grad is None or not p.grad.any() for p in bad.parameters())
    train(good, chunks, output_dir=str(tmp_path), resume=True, **options)
    assert all(weights.isfinite().all() for weights in scorers(good).values())


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, sparse_llama, chunks, tmp_path):
    step, calls = torch.optim.AdamW.step, []

    def overflow(self, *args, **options):
        step(self, *args, **options)
        calls.append(self)
        if len(calls) == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(ValueError, match=r"the scorers are not finite after step 3 .attention., and nothing of them"):
        train(sparse_llama(), chunks, output_dir=str(tmp_path), checkpoint_every=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "finetune.json").exists()


def test_where_an_adapter_lies_finetune_json_waits_for_its_weights(sparse_llama, chunks, tmp_path):
    model = sparse_llama()
    model.save_pretrained(str(tmp_path))
    train(model, chunks, output_dir=str(tmp_path))
    assert not (tmp_path / "finetune.json").exists()


def test_gradients_are_checked(monkeypatch, sparse_llama, chunks):
    monkeypatch.setitem(
        objectives.OBJECTIVES["causal"],
        "lm",
        lambda model, batch: sum(p.sum() for p in model.parameters() if p.requires_grad) * 0,
    )
    with pytest.raises(ValueError, match="all gradients are 0"):
        train(sparse_llama(), chunks, objective="lm", warm_start_steps=0)


@pytest.mark.parametrize("dtype, mixed", [(torch.bfloat16, "no"), (torch.float16, "no"), (torch.float32, "bf16")])
def test_half_precision_on_a_cpu_warns_once(sparse_llama, chunks, dtype, mixed):
    model = sparse_llama().to(dtype)
    for method in sparse_layers(model):
        method.float()  # scorers stay in float32, as PEFT keeps them
    config = FinetuneConfig(steps=2, warm_start_steps=1, mixed_precision=mixed, progress=False, cpu=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        finetune(model, chunks, config)
    name = "float16" if dtype == torch.float16 else "bfloat16"
    (warning,) = [w for w in told if "slower than in float32" in str(w.message)]
    assert f"training in {name} on a CPU" in str(warning.message) and warning.filename == __file__


def test_float32_on_a_cpu_does_not_warn(sparse_llama, chunks):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        finetune(sparse_llama(), chunks, FinetuneConfig(steps=1, warm_start_steps=0, progress=False, cpu=True))
    assert not [w for w in told if "slower than in float32" in str(w.message)]


def test_the_metrics_of_an_earlier_run_name_their_weights(tiny_llama, tmp_path):
    model = peft.get_peft_model(tiny_llama(), SparseKConfig(k=4, window=4, sinks=1))
    chunks = torch.randint(3, 64, (4, 32))
    settings = {"warm_start_steps": 0, "batch_size": 2, "progress": False, "cpu": True, "output_dir": str(tmp_path)}
    for steps in (1, 2):
        finetune(model, chunks, FinetuneConfig(steps=steps, **settings))
        model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "finetune.json").read_text())
    assert told["settings"]["steps"] == 1
    assert told["weights_sha256"] != hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
