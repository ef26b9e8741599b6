"""Options from a YAML file, the estimate, and the command that does a run again."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from hf_sparse.cli.program import app
from hf_sparse.demo import CHECKPOINT


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "text.txt").write_text("def twice(number):\n    return 2 * number\n" * 200)
    budget = ["--k", 4, "--window", 4, "--sinks", 1]
    assert run("patch", CHECKPOINT, *budget, "--output", tmp_path / "adapter").exit_code == 0
    return tmp_path / "adapter"


def test_a_file_of_options_and_the_command_on_the_card(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"text": ["text.txt"], "steps": 3, "warm-start-steps": 0, "length": 64, "batch_size": 1, "device": "cpu"}
    options |= {"teacher-window": 16}
    (tmp_path / "run.yaml").write_text(json.dumps(options))
    before = sorted(path.name for path in adapter.iterdir())
    told = run("finetune", adapter, "--config", "run.yaml", "--dry-run")
    assert told.exit_code == 0 and "3 steps on 192 tokens would take about" in told.output, told.output
    assert sorted(path.name for path in adapter.iterdir()) == before
    assert run("finetune", adapter, "--config", "run.yaml", "--steps", 2).exit_code == 0
    metrics = json.loads((adapter / "finetune.json").read_text())
    assert (metrics["settings"]["steps"], metrics["settings"]["length"]) == (2, 64)
    card = (adapter / "README.md").read_text()
    assert metrics["command"] in card and "--teacher-window 16" in card and "| teacher_window | 16 |" in card
    words = shlex.split(metrics["command"])
    assert words[:3] == ["hf-sparse", "finetune", "DIR"] and str(tmp_path) not in metrics["command"]
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    budget = ["--k", 4, "--window", 4, "--sinks", 1]
    assert run("patch", CHECKPOINT, *budget, "--output", adapter, "--force").exit_code == 0
    assert run("finetune", adapter, *words[3:]).exit_code == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "content, message",
    [("stepz: 3", "has stepz, which are no options"), ("- 3", "must hold options by their names"), ("{", "be read")],
)
def test_refuses_what_is_no_file_of_options(adapter, tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    told = run("finetune", adapter, "--config", tmp_path / "run.yaml")
    assert told.exit_code == 2 and message in " ".join(told.output.replace("│", "").split()), told.output
