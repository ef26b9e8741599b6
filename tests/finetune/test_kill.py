"""`kill -9` of any process at any point of a step leaves a whole checkpoint, from which any number goes on.

The launched processes run this file. With `--full` the matrix of processes and points is printed as a table.
"""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse.finetune import FinetuneConfig, checkpoint, finetune, optimiser_step

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]

#: Where a process is killed, which ones reach it, and the step of the checkpoint that is there afterwards.
POINTS = {
    "in the backward of step 4": ((0, 1), 3),
    "before gradients of step 4 are averaged": ((0, 1), 3),
    "while others save step 3": ((1,), (2, 3)),
    "in the middle of checkpoint 3": ((0,), 2),
    "before checkpoint 3 gets its name": ((0,), 2),
    "before older ones than checkpoint 3 go": ((0,), 3),
}


def train(output, batch_size):
    torch.manual_seed(1)
    model = get_peft_model(FAMILIES["llama"].make(), hf_sparse.SparseKConfig(k=6, window=8, sinks=2))
    chunks = torch.randint(5, 64, (12, 96), generator=torch.Generator().manual_seed(2))
    place = {"output_dir": str(output), "checkpoint_every": 1, "resume": True} if output else {}
    settings = {"steps": 4, "warm_start_steps": 2, "warmup_steps": 1, "progress": False}
    finetune(model, chunks, FinetuneConfig(**settings, batch_size=batch_size, **place))
    return {name: tensor.detach().cpu() for name, tensor in get_peft_model_state_dict(model).items()}


def kill_at(point):
    """Let this process end by SIGKILL, as the kernel does it when memory runs out."""
    calls = []

    def count(owner, name, number, after=False, only=lambda *args: True):
        real = getattr(owner, name)

        def counted(*args, **options):
            if only(*args):
                calls.append(name)
            reached = calls.count(name) == number and only(*args)
            result = real(*args, **options) if after or not reached else None
            if reached:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)

    {
        "in the backward of step 4": lambda: count(accelerate.Accelerator, "backward", 4),
        "before gradients of step 4 are averaged": lambda: count(optimiser_step, "average_gradients", 4),
        "while others save step 3": lambda: count(accelerate.Accelerator, "wait_for_everyone", 4, after=True),
        "in the middle of checkpoint 3": lambda: count(checkpoint, "save_file", 6),
        "before checkpoint 3 gets its name": lambda: count(
            Path, "write_text", 3, after=True, only=lambda path, *_: path.name == "state.json"
        ),
        "before older ones than checkpoint 3 go": lambda: count(checkpoint, "recover", 4),
    }[point]()


def launch(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < 2 else {}
    environment = {**os.environ, **hidden}
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=600, env=environment
    )


def same(weights, expected):
    return weights.keys() == expected.keys() and all(
        torch.allclose(weights[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected
    )


@pytest.mark.full
def test_kill_matrix(tmp_path, capsys):
    expected, rows = train(None, 4), []
    for point, (ranks, left) in POINTS.items():
        for rank in ranks:
            output = tmp_path / f"{len(rows)}"
            assert launch(output, rank, point).returncode != 0
            state = checkpoint.load_state(checkpoint.latest(output))
            assert state["step"] in (left if isinstance(left, tuple) else (left,)), point
            if len(rows) % 2:
                done = launch(output, "", "")
                assert done.returncode == 0, done.stderr[-3000:]
                weights, count = load_file(output / "final.safetensors"), 2
            else:
                weights, count = train(output, 4), 1
            assert same(weights, expected), (point, rank)
            assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000006"]
            rows.append(f"| {point} | {rank} | {state['step']} | {count}: the same weights |")
    with capsys.disabled():
        print("\n| killed | process | whole checkpoint of step | goes on with processes |\n|---|---|---|---|")
        print("\n".join(rows))


@pytest.mark.parametrize("batch_size, accumulation", [(2, 2), (1, 4)])
def test_resumes_where_a_step_is_divided_otherwise(tmp_path, stopped, batch_size, accumulation):
    """As more or fewer processes divide it; the whole chunks of a step must be as many."""
    settings = {"warm_start_steps": 2, "steps": 4, "warmup_steps": 1, "progress": False, "cpu": True}
    chunks = torch.randint(5, 64, (12, 96), generator=torch.Generator().manual_seed(2))
    place = {"output_dir": str(tmp_path), "checkpoint_every": 1}

    def make():
        torch.manual_seed(1)
        return get_peft_model(FAMILIES["llama"].make(), hf_sparse.SparseKConfig(k=6, window=8, sinks=2))

    with stopped(3):
        finetune(make(), chunks, FinetuneConfig(**settings, **place, batch_size=4))
    with pytest.raises(ValueError, match=r"other settings than the checkpoint's; different: batch_size"):
        finetune(make(), chunks, FinetuneConfig(**settings, **place, batch_size=2, resume=True))
    divided = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    resumed, whole = make(), make()
    finetune(resumed, chunks, FinetuneConfig(**settings, **place, **divided, resume=True))
    finetune(whole, chunks, FinetuneConfig(**settings, batch_size=4))
    assert same(get_peft_model_state_dict(resumed), get_peft_model_state_dict(whole))


if __name__ == "__main__":
    output, rank, point = sys.argv[1:]
    if os.environ["RANK"] == rank:
        kill_at(point)
    weights = train(Path(output), 2)
    if os.environ["RANK"] == "0":
        save_file(weights, Path(output) / "final.safetensors")
