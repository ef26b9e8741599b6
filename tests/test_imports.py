"""What an import does, and does not do, in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def python(tmp_path):
    """Runs code away from the repository, so that only what is installed can be imported."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("name", ["hf_sparse", "hf_sparse.patches", "hf_sparse.finetune"])
def test_imports_without_triton(python, name):
    run = python(f"import sys; sys.modules['triton'] = None; import {name}")
    assert run.returncode == 0, run.stderr


def test_import_changes_no_model(python):
    """Importing hf_sparse may add its own attention and mask functions; it replaces none and loads no model family."""
    run = python("""
import sys
import peft
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    families = {name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name}
    return families, dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)

families, *registries = state()
import hf_sparse
families_after, *registries_after = state()

assert families_after == families, families_after - families
for before, after in zip(registries, registries_after):
    replaced = [name for name in before if after.get(name) is not before[name]]
    assert not replaced, replaced
    added = after.keys() - before.keys()
    assert all(name.startswith("hf_sparse") for name in added), added
""")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("folder", ["patches", "finetune"])
def test_short_name_is_refused(python, folder):
    run = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}")
    assert run.returncode != 0
    assert f"ImportError: import this package as hf_sparse.{folder}, not as {folder}" in run.stderr
