"""The training settings of each method: what they are, and that reading them takes no torch."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hf_sparse.core.registry import registered_methods
from hf_sparse.core.settings import TrainingSettings, values_of
from hf_sparse.finetune.config import SharedSettings

ROOT = Path(__file__).parents[2]
METHODS = {method.name: method for method in registered_methods().values()}
RECIPES = {
    "sparsek": {"final_scale": 1.0, "warm_start_steps": 40, "divide_heads": True, "lora_steps": 0},
    "sparsefinder": {
        "graph_steps": 100,
        "graph_loss": "profile_nce",
        "graph_rows": 128,
        "graph_learning_rate": 1e-2,
        "alpha_start": None,
    },
}


def test_the_defaults_are_the_recipes_that_were_measured():
    assert {name: values_of(method.training().settings_type()) for name, method in METHODS.items()} == RECIPES


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_frozen_and_no_shared_ones(name):
    settings = METHODS[name].training().settings_type()
    assert isinstance(settings, TrainingSettings)
    with pytest.raises(AttributeError):
        settings.steps = 3  # type: ignore[attr-defined]
    assert not {field.name for field in fields(settings)} & {field.name for field in fields(SharedSettings)}


FILES = ["finetune/config.py", *(f"hf_sparse/methods/{name}/training_settings.py" for name in RECIPES)]


@pytest.mark.parametrize("file", FILES)
def test_the_fields_are_read_without_torch(file):
    """Without the packages around them, whose `__init__` registers the methods."""
    code = f"""
import sys, types
from importlib.util import module_from_spec, spec_from_file_location
for name in ("hf_sparse", "hf_sparse.core"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(ROOT)!r} + "/" + name.replace(".", "/")]
spec = spec_from_file_location("settings", {str(ROOT / file)!r})
module = sys.modules["settings"] = module_from_spec(spec)
spec.loader.exec_module(module)
heavy = {{"torch", "transformers", "peft", "accelerate"}} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
