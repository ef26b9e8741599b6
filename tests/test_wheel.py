"""The wheel holds what the source tree holds: a subpackage or data file missing from pyproject.toml fails here.

It is built from the source distribution, as by whoever has no wheel, so that what is missing there is missing here.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"hf_sparse": "hf_sparse", "patches": "hf_sparse/patches", "finetune": "hf_sparse/finetune"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads: in the repository, a stale build/ could put deleted modules in the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (source / "tests").mkdir()
    shutil.copy(__file__, source / "tests")
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
def built(source, expected, tmp_path_factory) -> Path:
    # `expected` is asked for only to be listed before the build writes into `source`.
    out = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.fixture(scope="module")
def shipped(built) -> set[str]:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def modules(files: set[str]) -> set[str]:
    return {name for name in files if name.endswith(".py")}


def test_modules(shipped, expected):
    assert modules(shipped) == modules(expected)


def test_package_data(shipped, expected):
    assert "hf_sparse/py.typed" in shipped
    assert shipped - modules(shipped) == expected - modules(expected)


def test_one_package_is_installed(shipped):
    """`patches` and `finetune` are names that anyone could have."""
    assert {name.split("/")[0] for name in shipped} == {"hf_sparse"}


def test_source_distribution(built):
    """Some tests would be worse than none: setuptools takes tests/test*.py, and they need what lies beside them."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        folders = {name.split("/")[1] for name in tar.getnames() if name.count("/") > 1}
    assert folders == {"hf_sparse", "patches", "finetune", "hf_sparse.egg-info"}
