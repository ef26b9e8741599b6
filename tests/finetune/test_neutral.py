"""The loop knows no method: no file of `finetune/` names one, or one of its settings or objectives."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from hf_sparse.core.registry import registered_methods
from hf_sparse.finetune.objectives import OBJECTIVES

FILES = sorted((Path(__file__).parents[2] / "finetune").glob("*.py"))
METHODS = registered_methods().values()
SHARED = {name for objectives in OBJECTIVES.values() for name in objectives}


def words():
    for method in METHODS:
        training = method.training()
        yield from (method.name, method.layer.label, method.config.__name__, method.layer.__name__)
        yield from (f"`{name}`" for name in training.objectives if name not in SHARED)
        yield from (f'"{name}"' for name in training.objectives if name not in SHARED)
        yield from (field.name for field in fields(training.settings_type))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_names_a_method(file):
    text = file.read_text("utf-8")
    assert [word for word in words() if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)] == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_shared_objectives_are_those_of_every_method(method):
    assert set(method.training().objectives) >= SHARED == {"distill", "lm"}
