"""DeepSpeed's ZeRO-3 divides the base, and what is trained is that of one process; so is it after a `kill -9`.

The launched processes run this file, and in it what those of the other engines do.
"""

import json
import os
import runpy
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_sparse.finetune import checkpoint

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`: run `make composition`")

KILL_FILE = Path(__file__).with_name("test_kill.py")
KILL, PROCESSES = (runpy.run_path(str(path)) for path in (KILL_FILE, Path(__file__).with_name("test_processes.py")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return what two launches of two processes left: of the first, one is killed; the second resumes."""
    path = tmp_path_factory.mktemp("zero3")
    killed = [KILL_FILE, path / "run", 1, "in the backward of step 4"]
    assert "Signal 9 (SIGKILL) received" in PROCESSES["launch"](*killed, engine="zero3", fails=True)
    shutil.copytree(path / "run", path / "copy")
    PROCESSES["launch"](__file__, path, engine="zero3")
    return path


def test_processes_do_what_one_does(folder):
    """Two processes, each with half of the base by DeepSpeed's ZeRO-3, train what one process trains."""
    PROCESSES["check_processes"](folder, "zero3", 2)


def test_resumes_after_a_kill(folder):
    """A killed process ends the other one; the checkpoint goes on with two processes, or with one and no DeepSpeed."""
    assert checkpoint.load_state(checkpoint.latest(folder / "copy"))["step"] == 3
    versions = json.loads((folder / "run" / "finetune.json").read_text())["versions"]
    assert versions["deepspeed"] == version("deepspeed")
    expected = KILL["train"](None, 4)
    assert KILL["same"](load_file(folder / "resumed.safetensors"), expected)
    assert KILL["same"](KILL["train"](folder / "copy", 4), expected)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    resumed = KILL["train"](place / "run", 2)
    if os.environ["RANK"] == "0":
        save_file(resumed, place / "resumed.safetensors")
    PROCESSES["work"](place)
