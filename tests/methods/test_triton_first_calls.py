"""A first call of `generate` begins to compile the kernels of all layers and steps together, and none twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "count_kernels.py"
NAMES = ["generate", "one token", "plain forward", "equal heads", "short prompt"]


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Return the report of `count_kernels.py`, by call; kernels are defined for a GPU in a process of its own."""
    report = tmp_path_factory.mktemp("kernels") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(WORKER), str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(NAMES, json.loads(report.read_text()), strict=True))


@pytest.mark.parametrize("name", ["generate", "equal heads", "short prompt"])
def test_all_that_a_first_call_launches_has_begun(counts, name):
    """The prompt's kernels are compiled together, those of the steps beside them, and launches find them."""
    assert set(counts[name]) == {"begun", "ahead"}
    assert set(counts[name]["begun"]) == {"_step"}


def test_layers_share_the_kernels_of_steps(counts):
    """Of four layers one has equal heads, and of the others two are about as long."""
    assert counts["generate"]["begun"] == {"_step": 3}
    assert counts["equal heads"]["begun"] == {"_step": 1}


def test_steps_that_nobody_takes_are_not_compiled(counts):
    assert set(counts["one token"]) == {"ahead"}
    assert counts["one token"]["ahead"] == counts["generate"]["ahead"]


def test_a_plain_forward_compiles_what_it_launches_alone(counts):
    """That is the kernels of its prompt, without those that a recorded prompt has, and of the steps that come."""
    forward = counts["plain forward"]
    assert set(forward) == {"ahead", "launched"} and forward["launched"] == counts["generate"]["begun"]
    assert sum(forward["ahead"].values()) < sum(counts["generate"]["ahead"].values())
