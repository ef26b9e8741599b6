"""Every kernel compiles for GPUs that the machine does not have, and what Triton's compiler refuses is found.

The interpreter replaces what a kernel calls in the whole process, so that kernels are compiled in one of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PLANTED = """
import sys

import torch
import triton
import triton.language as tl

@triton.jit
def helper(x, TWICE: tl.constexpr):
    if TWICE:
        x *= 2
    else:
        x += 1
    return x

@triton.jit
def kernel(X, Y, ROWS: tl.constexpr, D: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :]
    q = tl.load(X + at)
    for begin in range(0, 64, 32):
        at = (begin + tl.arange(0, 32))[:, None] * D + tl.arange(0, D)[None, :]
        k = tl.load(X + at)
        q += tl.sum(helper(k, True), 0)[None, :]
    tl.store(Y + at, q)

@triton.jit
def nobody_launches(X):
    tl.store(X, 0.0)

@triton.jit
def large(X, D: tl.constexpr):
    x = tl.load(X + tl.arange(0, 128)[:, None] * D + tl.arange(0, D)[None, :])
    product = tl.dot(x, tl.trans(x), input_precision="tf32x3")
    tl.store(X + tl.arange(0, 128)[:, None] * D + tl.arange(0, 128)[None, :], product)

def call():
    kernel[(1,)](torch.empty(64, 128), torch.empty(64, 128), ROWS=16, D=128)

def call_large():
    large[(1,)](torch.empty(128, 256), D=256)

CALLS, MORE, MODULES = [call], [call_large], [sys.modules[__name__]]
"""


def compiled(calls: Path, folder: Path, *options: str) -> dict:
    """Compile what the calls launch; returns the report of `compile_kernels.py`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(calls), str(folder / "report.json"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return json.loads((folder / "report.json").read_text())


def test_every_kernel_compiles(tmp_path, pytestconfig):
    """With each of its statements, in an amount of shared memory that GPUs have."""
    report = compiled(HERE / "kernel_calls.py", tmp_path, *["--full"] * pytestconfig.getoption("full"))
    assert not report["faults"], "\n\n".join(f"{kernel}\n{error}" for kernel, error in report["faults"].items())
    assert not report["left_out"], "no call in kernel_calls.py compiles these:\n" + "\n".join(report["left_out"])
    assert len(report["shared"]) > 80  # kernels and GPUs


def test_what_the_interpreter_does_not_see_is_found(tmp_path):
    """A name used twice, too much shared memory, and statements that no call compiles."""
    calls = tmp_path / "planted.py"
    calls.write_text(PLANTED)
    report = compiled(calls, tmp_path, "--full")
    faults = {re.sub(r"planted\.(\w+ sm_\d+) .*", r"\1", kernel): error for kernel, error in report["faults"].items()}
    assert list(faults) == ["kernel sm_80", "kernel sm_90", "large sm_90"]
    twice = "at has initial type <['16', '128'], int64> but is re-assigned to <['32', '128'], int32>"
    assert twice in faults["kernel sm_80"] and twice in faults["kernel sm_90"]
    assert faults["large sm_90"] == "262144 bytes of shared memory, of 232448"
    assert report["shared"].keys() == {"planted.large sm_80", "planted.large sm_90"}
    left_out = [re.sub(r"planted.py:\d+ ", "", statement) for statement in report["left_out"]]
    assert left_out == ["helper: x += 1", "kernel: tl.store(Y + at, q)", "nobody_launches"]
