"""Processes with a part of the batch each train what one does with the whole; on GPUs where there are so many.

The launched processes run this file.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from copy import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import hf_sparse
from hf_sparse.demo import CHECKPOINT
from hf_sparse.environment import cuda_of_process, is_main_process
from hf_sparse.finetune import FinetuneConfig, config_file, finetune, loop, objectives, optimiser_step, processes
from hf_sparse.finetune.launch import is_sharded, is_zero3

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
CONFIGS = {
    "sparsek": hf_sparse.SparseKConfig(k=6, window=8, sinks=2, lora_rank=2),
    "sparsefinder": hf_sparse.SparsefinderConfig(rank=4, clusters=4, tile=8, window=8),
}
#: How the processes of an engine hold the base model.
BASES = {"torchrun": ["whole"], "ddp": ["whole"], "fsdp2": ["divided", "whole"], "zero3": ["divided"]}
CPU = torch.cuda.device_count() < 2
ONE_GPU = torch.cuda.device_count() == 1  # two processes cannot share it; without one nothing has to be said


def train(method, batch_size):
    torch.manual_seed(1)
    model = get_peft_model(FAMILIES["llama"].make(), copy(CONFIGS[method]))
    chunks = torch.randint(5, 64, (12, 96), generator=torch.Generator().manual_seed(2))
    # The teacher of one method sees all of its texts, that of the other one windows.
    before = {"warm_start_steps": 2, "teacher_window": 24} if method == "sparsek" else {"graph_steps": 2}
    config = FinetuneConfig(steps=4, warmup_steps=1, **before, batch_size=batch_size, progress=False, cpu=ONE_GPU)
    metrics = finetune(model, chunks, config)
    learned = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    return learned, [row["loss"] for row in metrics["history"]], metrics.get("base_share")


def masked_gradients(method, objective, batch_size, accumulation):
    """Gradients and loss of the first step on chunks of which some have 30 times as many hidden tokens as others."""
    torch.manual_seed(1)
    model = get_peft_model(FAMILIES["bert"].make(), copy(CONFIGS[method]))  # PEFT notes the base in it
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 64, (8, 96), generator=generator)
    hidden = torch.rand(tokens.shape, generator=generator) < torch.tensor([0.02, 0.6] * 4)[:, None]
    hidden[:, 7] = True
    data = {"input_ids": tokens.masked_fill(hidden, 4), "labels": tokens.masked_fill(~hidden, -100)}
    before = {"warm_start_steps": 0} if method == "sparsek" else {"graph_steps": 0}
    config = FinetuneConfig(
        objective=objective, steps=1, **before, batch_size=batch_size, gradient_accumulation_steps=accumulation,
        learning_rate=1e-12, progress=False, cpu=ONE_GPU,
    )  # fmt: skip
    gradients, mean = {}, optimiser_step.average_gradients

    def note(accelerator, parameters, loss):
        loss = mean(accelerator, parameters, loss)
        gradients.update({name: p.grad.detach().cpu().clone() for name, p in parameters.items()})
        return loss

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optimiser_step, "average_gradients", note)
        loss = finetune(model, data, config)["history"][0]["loss"]
    return gradients, loss


train_alone, masked_gradients_alone = cache(train), cache(masked_gradients)


class Collectives(TorchDispatchMode):
    """Count the collective operations within a `with` block."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def collectives(call, *arguments):
    """Return how many collective operations each optimiser step of a call takes."""
    counts, take_step = [], loop.take_step

    def counted(*args, **options):
        with Collectives() as seen:
            result = take_step(*args, **options)
        counts.append(seen.count)
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "take_step", counted)
        call(*arguments)
    return counts


def exchange():
    """Return what processes make of gradients, and of layers, that are not alike in kind: dtypes, strides, none."""
    accelerator = processes.make_accelerator(FinetuneConfig(cpu=ONE_GPU))
    device, rank = accelerator.device, accelerator.process_index
    zeros = {"first": torch.zeros(2, 3), "half": torch.zeros(4).bfloat16(), "without": torch.zeros(2)}
    zeros |= {"turned": torch.zeros(3, 2).T, "last": torch.zeros(())}
    parameters = {name: torch.nn.Parameter(tensor.to(device)) for name, tensor in zeros.items()}
    for number, (name, parameter) in enumerate(parameters.items()):
        parameter.grad = None if name == "without" else torch.full_like(parameter, 4 * number + rank)
    loss = processes.average_gradients(accelerator, parameters, torch.tensor(8.0 + rank, device=device))
    layer = torch.nn.BatchNorm1d(3, device=device)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(1 + rank)
    places = [tensor.data_ptr() for tensor in layer.state_dict().values()]
    processes.copy_from_first_process([layer])
    assert places == [tensor.data_ptr() for tensor in layer.state_dict().values()]
    means = {name: parameter.grad.cpu() for name, parameter in parameters.items()}
    return means | {"loss": loss.cpu()}, {name: tensor.cpu() for name, tensor in layer.state_dict().items()}


def end_by_one():
    """Return the error of this process for a loss that is not finite in the first one."""
    distill = objectives.OBJECTIVES["causal"]["distill"]
    scale = torch.nan if is_main_process() else 1.0
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError) as error:
        patched.setitem(objectives.OBJECTIVES["causal"], "distill", lambda *batch, **options: scale * distill(*batch))
        train("sparsek", 1)
    return str(error.value)


def check_exchange(means, copied, count):
    further = (count - 1) / 2  # the mean of the ranks
    for name, value in {"first": 0, "half": 4, "turned": 12, "last": 16, "loss": 8}.items():
        assert torch.equal(means[name], torch.full_like(means[name], value + further)), name
    assert not means["without"].any() and means["turned"].shape == (2, 3) and means["half"].dtype == torch.bfloat16
    assert len(copied) == 5 and all(bool((tensor == 1).all()) for tensor in copied.values())


def launcher(engine, count, logs):
    """`torchrun` itself, or `accelerate launch` with a configuration that comes with hf-sparse."""
    if engine == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--log-dir", logs]
    config = ["--config_file", str(config_file(engine)), "--num_processes", str(count), "--log_dir", logs]
    return ["-m", "accelerate.commands.launch", *config]


def launch(*command, engine="torchrun", count=2, fails=False):
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < count else {}
    with TemporaryDirectory() as logs:  # without a folder for logs the launcher makes one and leaves it
        run = [sys.executable, *launcher(engine, count, logs), *map(str, command)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=600, env={**os.environ, **hidden})
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize(
    "engine, count",
    [
        ("fsdp2", 2),
        *(pytest.param(*run, marks=pytest.mark.full) for run in (("torchrun", 2), ("ddp", 4), ("fsdp2", 4))),
    ],
)
def test_processes_do_what_one_does(tmp_path, engine, count):
    """Two processes by FSDP2, which divides the base, and with the whole base (DDP) train what one process trains.

    One launch for all methods, and for both ways to hold the base, since it takes longer than what is compared.
    """
    launch(__file__, tmp_path, engine=engine, count=count)
    check_processes(tmp_path, engine, count)


def check_processes(folder, engine, count):
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
    for base in BASES[engine]:
        for method in CONFIGS:
            check_training(method, *(rank[base][f"train {method}"] for rank in ranks))
            check_gradients(method, *(rank[base][f"masked {method}"] for rank in ranks))
            shares = [rank[base][f"train {method}"][2] for rank in ranks]
            assert shares == [None] * count if base == "whole" else max(shares) < 1.02 / count
        for rank in ranks:
            check_exchange(*rank[base]["exchange"], count)
            ended = rank[base]["ended by one"]
            assert "the loss of step 3 (distill) is nan; the scorers and LoRA are those of the step" in ended
    for rank in ranks if "whole" in BASES[engine] else ():  # with a divided base, the base is gathered as well
        # Gradients, LoRA's too, and the loss in one; of a masked language model the number of hidden tokens besides.
        assert rank["whole"]["collectives"] == [1] * 6 and rank["whole"]["masked collectives"] == [2]


def check_training(method, one, *others):
    first, history, _ = one
    for learned, losses, _ in others:
        assert losses == history
        assert learned.keys() == first.keys() and all(torch.equal(first[name], learned[name]) for name in first)
    alone, expected, _ = train_alone(method, 4)
    if method == "sparsefinder" and not CPU:  # sums in another order there: what is fitted may differ by a token
        history, expected = history[:4], expected[:4]
        first = {name: first[name] for name in first if "scale" in name}
        assert first
    assert history == pytest.approx(expected, rel=1e-5)
    for name in first:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6)


def check_gradients(method, *ranks):
    """Two processes that accumulate have the gradient of one batch of hidden tokens."""
    expected, expected_loss = masked_gradients_alone(method, "lm", 8, 1)
    for gradients, loss in ranks:
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["distill", "lm"])
@pytest.mark.parametrize("method", CONFIGS)
def test_accumulation_gives_the_gradient_of_one_batch_of_hidden_tokens(method, objective):
    expected, expected_loss = masked_gradients_alone(method, objective, 8, 1)
    gradients, loss = masked_gradients(method, objective, 1, 8)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())


@pytest.mark.full
def test_the_command_line_writes_and_tells_once(tmp_path):
    text, adapter = tmp_path / "text.txt", tmp_path / "adapter"
    text.write_text("def twice(number):\n    return 2 * number\n" * 200)
    command = ["-m", "hf_sparse"]
    options = ["--k", "4", "--window", "4", "--sinks", "1", "--output", adapter]
    subprocess.run([sys.executable, *command, "patch", CHECKPOINT, *options], check=True)
    before = load_file(adapter / "adapter_model.safetensors")
    options = ["--steps", "2", "--warm-start-steps", "0", "--length", "64", "--batch-size", "1"]
    options += ["--num-processes", "2", "--accelerate-config", "fsdp2", "--device", "cpu" if CPU else "cuda"]
    run = [sys.executable, *command, "finetune", adapter, "--text", text, *options]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if CPU else {}
    environment = {**os.environ, **hidden}
    done = subprocess.run(list(map(str, run)), capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained adapter") == 1
    assert done.stderr.count("1 of 43 chunks of 64 tokens at a time in each of 2 processes") == 1
    metrics = json.loads((adapter / "finetune.json").read_text())
    assert metrics["tokens"] == 2 * 2 * 64 and metrics["settings"]["processes"] == 2
    assert metrics["base_share"] < 0.51
    after = load_file(adapter / "adapter_model.safetensors")
    assert after.keys() == before.keys() and not any(torch.equal(after[name], before[name]) for name in after)


def test_a_rank_without_a_local_one_is_no_launch(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert is_main_process() and cuda_of_process() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not is_main_process() and cuda_of_process() == "cuda:0"


def work(folder):
    """Train in a launched process, and leave for the test what it has learned."""
    count = int(os.environ["WORLD_SIZE"])
    results = {"divided" if is_sharded() else "whole": learn(count)}
    if is_sharded() and not is_zero3():
        for name in filter(re.compile("ACCELERATE_|FSDP_").match, list(os.environ)):
            del os.environ[name]  # what is left is what torchrun sets
        results["whole"] = learn(count)
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


def learn(count):
    results = {f"train {method}": train(method, 4 // count) for method in CONFIGS}
    results |= {f"masked {method}": masked_gradients(method, "lm", 4 // count, 2) for method in CONFIGS}
    if not is_sharded():
        results["collectives"] = collectives(train, "sparsek", 4 // count)
        results["masked collectives"] = collectives(masked_gradients, "sparsek", "lm", 4 // count, 2)
    return results | {"exchange": exchange(), "ended by one": end_by_one()}


if __name__ == "__main__":
    work(Path(sys.argv[1]))
