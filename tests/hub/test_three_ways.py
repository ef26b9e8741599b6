"""The whole way in two processes, over each transport: `three_ways.py` beside this."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full  # test_xet.py and test_full_model.py go there and back in one process
@pytest.mark.versions
@pytest.mark.parametrize("transport", ["xet", "classic"])
def test_three_ways(hub, hub_env, tmp_path, transport):
    if transport == "xet":  # what clients use by default
        del hub_env["HF_HUB_DISABLE_XET"]
    script, expected = Path(__file__).with_name("three_ways.py"), tmp_path / "expected.safetensors"
    for what, line in (("push", f"{hub.endpoint}/{hub.user}/"), ("load", "the same bits")):
        shutil.rmtree(hub_env["HF_HOME"], ignore_errors=True)  # with it goes all that the first process left
        hub.reset_trace()
        command = [sys.executable, str(script), what, hub.user, str(expected)]
        run = subprocess.run(command, env=hub_env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count(line) == 3
        assert bool(hub.count("GET", "^/xorbs/") + hub.count("POST", "^/v1/xorbs/")) == (transport == "xet")
        assert bool(hub.count("PUT", "^/lfs/") + hub.count("GET", "^/lfs/")) == (transport == "classic")
