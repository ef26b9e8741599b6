"""How threads of OpenMP wait in the process of the command line, and in no other."""

import os
import subprocess
import sys

import pytest

from hf_sparse.cli.threads import wait_briefly

TELL = "import os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    "given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": ""}, {"GOMP_SPINCOUNT": "7"}], ids=str
)
def test_what_a_user_set_stays(given, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    environment = dict(given)
    wait_briefly(environment)
    assert environment == given


def test_it_is_set_before_torch_reads_it_or_not_at_all(monkeypatch):
    environment: dict[str, str] = {}
    wait_briefly(environment)  # torch is there
    assert environment == {}
    monkeypatch.delitem(sys.modules, "torch")
    wait_briefly(environment)
    assert environment == {"GOMP_SPINCOUNT": "1000"}


def run(code, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-2:]


def test_the_command_line_sets_it_before_torch_is_there(tmp_path):
    start = "import sys; sys.argv = sys.orig_argv[:] = ['python', '-m', 'hf_sparse']; sys.argv = ['-m']"
    code = f"{start}; from hf_sparse.cli import main, program; program.app = lambda **_: None; main(); {TELL}"
    assert run(code, tmp_path) == ["1000", "False"]


@pytest.mark.full  # tests/test_imports.py looks at the environment after an import too
def test_an_import_sets_nothing(tmp_path):
    assert run(f"import hf_sparse, hf_sparse.cli; {TELL}", tmp_path) == ["None", "True"]
