"""What an import does, and does not do, in a fresh interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def python(tmp_path):
    """Runs code away from the repository and without a GPU, so that only what is installed can be imported."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def documented_names() -> list[str]:
    """Return what documents name in code as `hf_sparse.NAME`, without `hf_sparse`; the changelog names what is gone."""
    documents = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    code = [part for path in documents for part in re.findall(r"`([^`\n]+)`", path.read_text("utf-8"))]
    names = sorted({name for part in code for name in re.findall(r"\bhf_sparse\.(\w+(?:\.\w+)*)", part)})
    assert len(names) > 10
    return names


@pytest.mark.full  # test_import_changes_no_model_that_is_there blocks Triton too
@pytest.mark.parametrize("name", ["hf_sparse", "hf_sparse.patches", "hf_sparse.finetune"])
def test_imports_without_triton(python, name):
    run = python(f"import sys; sys.modules['triton'] = None; import {name}")
    assert run.returncode == 0, run.stderr


@pytest.mark.versions
def test_import_changes_no_model_that_is_there(python):
    """A model that was made before the import has the same bits, modules and functions after it; triton is blocked.

    The import may add its own attention and mask functions; it replaces none and loads no other model family, nor
    matplotlib, nor, beyond what transformers loads itself, jinja2. It sets no variable of the environment.
    """
    run = python(
        """
import os
import sys
sys.modules["triton"] = None
import peft
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
models = [LlamaForCausalLM(LlamaConfig(**size)).eval(), BertForMaskedLM(BertConfig(**size)).eval()]
ids = torch.arange(40).view(2, 20)
mask = (torch.arange(20) >= torch.tensor([[0], [7]])).long()

def state():
    functions = [(owner, name, value) for owner in (sdpa_attention, modeling_bert, modeling_llama)
                 for name, value in vars(owner).items() if callable(value)]
    functions += [(kind, name, value) for kind in map(type, models[0].modules()) for name, value in vars(kind).items()]
    functions += [(torch.nn.functional, name, value) for name, value in vars(torch.nn.functional).items()]
    anatomy = [(name, type(module), len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
               for model in models for name, module in model.named_modules()]
    return functions, anatomy, [model.config._attn_implementation for model in models]

@torch.no_grad()
def outputs():
    return [model(ids, attention_mask=mask).logits for model in models]

def families():
    return {name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name}

def registries():
    return dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)

before, expected = state(), outputs()
loaded, families_before, registries_before = set(sys.modules), families(), registries()
environment = dict(os.environ)
import hf_sparse
import hf_sparse.cli
assert dict(os.environ) == environment
assert state() == before
assert families() == families_before, families() - families_before
added = {name.split(".")[0] for name in set(sys.modules) - loaded}
assert "hf_sparse" in added and not added & {"matplotlib", "jinja2"}, added
for functions_before, functions in zip(registries_before, registries()):
    assert all(functions[name] is function for name, function in functions_before.items())
    assert all(name.startswith("hf_sparse") for name in functions.keys() - functions_before.keys())
assert all(torch.equal(*pair) for pair in zip(outputs(), expected))
assert hf_sparse.patches.sparse_layers(models[0]) == []

# The import is not idle: asked to, it patches.
hf_sparse.patch(models[0], hf_sparse.SparseKConfig(k=3, window=4, sinks=1))
assert not torch.equal(outputs()[0], expected[0])
hf_sparse.unpatch(models[0])
assert state() == before
assert all(torch.equal(*pair) for pair in zip(outputs(), expected))

# What documents call by its long name needs no second import.
from operator import attrgetter
for name in NAMES:
    attrgetter(name)(hf_sparse)
""".replace("NAMES", repr(documented_names()))
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("folder", ["patches", "finetune"])
def test_short_name_is_refused(python, folder):
    run = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}")
    assert run.returncode != 0
    assert f"ImportError: import this package as hf_sparse.{folder}, not as {folder}" in run.stderr
