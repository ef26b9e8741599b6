"""DeepSpeed's ZeRO-3 divides the base, and what is trained is that of one process; so is it after a `kill -9`.

The launched processes run the files of the same tests for the other engines.
"""

import runpy
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_sparse.finetune import checkpoint

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`: run `make composition`")

FILES = {name: str(Path(__file__).with_name(f"test_{name}.py")) for name in ("processes", "kill")}
PROCESSES, KILL = (runpy.run_path(FILES[name]) for name in ("processes", "kill"))


def test_processes_do_what_one_does(tmp_path):
    """Two processes, each with half of the base by DeepSpeed's ZeRO-3, train what one process trains."""
    PROCESSES["check_processes"](tmp_path, "zero3", 2)


def test_resumes_after_a_kill(tmp_path):
    """A killed process ends the other one; the checkpoint goes on with two processes, or with one and no DeepSpeed."""
    output, copy = tmp_path / "run", tmp_path / "copy"
    done = PROCESSES["launch"](FILES["kill"], output, 1, "in the backward of step 4", engine="zero3", fails=True)
    assert "Signal 9 (SIGKILL) received" in done.stderr
    assert checkpoint.load_state(checkpoint.latest(output))["step"] == 3
    shutil.copytree(output, copy)
    PROCESSES["launch"](FILES["kill"], output, "", "", engine="zero3")
    expected = KILL["train"](None, 4)
    assert KILL["same"](load_file(output / "final.safetensors"), expected)
    assert KILL["same"](KILL["train"](copy, 4), expected)
