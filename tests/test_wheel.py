"""The wheel holds what the source tree holds: a subpackage or data file missing from pyproject.toml fails here."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"hf_sparse": "hf_sparse", "patches": "hf_sparse/patches", "finetune": "hf_sparse/finetune"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads: in the repository, a stale build/ could put deleted modules in the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return source


@pytest.fixture(scope="module")
def expected(source) -> set[str]:
    """The source files, docs aside, under the names they should have in the wheel."""
    return {
        f"{package}/{path.relative_to(source / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file() and path.suffix != ".md"
    }


@pytest.fixture(scope="module")
def shipped(source, expected, tmp_path_factory) -> set[str]:
    # `expected` is asked for only to be listed before the build writes into `source`.
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def modules(files: set[str]) -> set[str]:
    return {name for name in files if name.endswith(".py")}


def test_modules(shipped, expected):
    assert modules(shipped) == modules(expected)


def test_package_data(shipped, expected):
    assert "hf_sparse/py.typed" in shipped
    assert shipped - modules(shipped) == expected - modules(expected)
