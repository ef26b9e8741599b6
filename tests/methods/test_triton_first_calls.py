"""A first call of `generate` begins to compile the kernels of all layers and steps together, and none twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ON_A_GPU = """
import json, threading
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from triton import knobs
from hf_sparse import SparseKConfig, patch

found = []

def note(*, metadata, **rest):
    found.append((metadata["name"], threading.current_thread() is threading.main_thread()))

knobs.compilation.listener = note
sizes = {"hidden_size": 256, "intermediate_size": 64, "vocab_size": 64, "head_dim": 32, "num_hidden_layers": 4}
config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
shares = [[0.5, 1.5], [1.0, 1.0], [1.3, 0.575], [0.2, 1.925]]
patch(model, SparseKConfig(k=64, window=32, sinks=4, head_shares=shares))
model.generate(torch.zeros(1, 700, dtype=torch.int64, device="cuda"), max_new_tokens=8, do_sample=False)
print(json.dumps(found))
"""
WORKER = Path(__file__).parent / "count_kernels.py"
NAMES = ["generate", "one token", "plain forward", "equal heads", "short prompt", "few cores"]


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


@pytest.mark.parametrize("name", ["generate", "equal heads", "short prompt", "few cores"])
def test_all_that_a_first_call_launches_has_begun(counts, name):
    """The prompt's kernels are compiled together, those of the steps beside them, and launches find them."""
    assert set(counts[name]) == {"begun", "ahead"}
    assert set(counts[name]["begun"]) == {"_step"}


def test_on_few_cores_the_prompt_comes_first(counts):
    """Its kernels and those of the steps would share the cores, and the first token wait for both."""
    assert list(counts["few cores"]) == ["ahead", "begun"] and list(counts["generate"]) == ["begun", "ahead"]
    assert counts["few cores"] == counts["generate"]


def test_layers_share_the_kernels_of_steps(counts):
    """Take four layers, one with equal heads and three with unequal ones, two of which are about as long."""
    assert counts["generate"]["begun"] == {"_step": 3}
    assert counts["equal heads"]["begun"] == {"_step": 1}


def test_steps_that_nobody_takes_are_not_compiled(counts):
    assert set(counts["one token"]) == {"ahead"}
    assert counts["one token"]["ahead"] == counts["generate"]["ahead"]


def test_a_plain_forward_compiles_what_it_launches_alone(counts):
    """Count the kernels of its prompt, without those that a recorded prompt has, and of the steps that come."""
    forward = counts["plain forward"]
    assert set(forward) == {"ahead", "launched"} and forward["launched"] == counts["generate"]["begun"]
    assert sum(forward["ahead"].values()) < sum(counts["generate"]["ahead"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on a GPU")
def test_on_a_gpu_no_launch_compiles(tmp_path):
    """All kernels are compiled by other threads than the one that launches them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "error:kernels are compiled", "-c", ON_A_GPU]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [name for name, _ in found].count("_step") == 3
    assert not [name for name, is_main in found if is_main]
