"""`info`: what an adapter is, without its base model."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_sparse import SparsefinderConfig, SparseKConfig, cli, workflow
from hf_sparse.base_model import CHECKPOINT

CARDS = Path(__file__).parents[2] / "model_cards"


def info(*arguments):
    result = CliRunner().invoke(cli.app, ["info", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_trained_and_measured_adapter():
    folder = CARDS / "demo-llama-sparsek-64"
    training, evaluation = (json.loads((folder / name).read_text()) for name in ("finetune.json", "eval.json"))
    content = json.loads(info(folder, "--json"))
    assert content["method"] == "SparseK" and content["base_model"] == "demo"
    assert content["attends_to"].startswith("64 keys per query and KV head")
    assert content["parameters"] == training["trainable_parameters"]
    assert content["trained"].startswith(f"distill, {len(training['history'])} steps, {training['tokens']:,} tokens")
    assert content["measured"].startswith(evaluation["text"]["name"])
    shown = info(folder)
    assert f"{content['parameters']:,}" in shown and "perplexity" in shown and "learned" in shown


@pytest.mark.parametrize("name", ["wiki-bert-sparsefinder", "smollm2-135m-instruct-sparsefinder-lora"])
def test_other_published_adapters(name):
    content = json.loads(info(CARDS / name, "--json"))
    assert content["method"] == "Sparsefinder" and content["trained"] and content["measured"]
    assert (content["lora_parameters"] is not None) == name.endswith("lora")
    assert info(CARDS / name)


def test_losses_of_two_stages_are_not_compared():
    """The graph of Sparsefinder has a loss of its own, whose last value says nothing about the first of `distill`."""
    folder = CARDS / "wiki-gpt2-sparsefinder"
    rows = json.loads((folder / "finetune.json").read_text())["history"]
    expected = []
    for stage in ("distill", "graph"):
        losses = [row["loss"] for row in rows if row["stage"] == stage]
        expected.append(f"of {stage} {losses[0]:.4g} to {losses[-1]:.4g}")
    assert json.loads(info(folder, "--json"))["trained"].endswith(f", loss {', '.join(expected)}")


@pytest.mark.parametrize("config", [SparseKConfig(layers=[0]), SparsefinderConfig()], ids=["sparsek", "sparsefinder"])
def test_an_untrained_adapter(config, tmp_path):
    workflow.create_adapter("demo", config, tmp_path / "new")
    content = json.loads(info(tmp_path / "new", "--json"))
    assert content["trained"] is content["measured"] is None and content["parameters"] > 0
    assert content["layers"] == ("all" if config.layers is None else "0")
    assert "trained" not in info(tmp_path / "new")


def test_what_was_measured_of_other_weights_is_said(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(CARDS / "demo-llama-sparsek-64", folder)
    for name in ("finetune.json", "eval.json"):
        content = json.loads((folder / name).read_text()) | {"weights_sha256": "0" * 64}
        (folder / name).write_text(json.dumps(content))
    shown = info(folder)
    assert "eval.json was measured with other weights" in shown
    assert "finetune.json tells of the training of other weights" in shown and "perplexity" not in shown


def test_a_folder_of_a_base_model_is_stored_by_its_whole_path(tmp_path, monkeypatch):
    shutil.copytree(CHECKPOINT, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(cli.app, ["patch", "base", "--output", "adapter"])
    assert made.exit_code == 0, made.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert json.loads(info("../adapter", "--json"))["base_model"] == str(tmp_path / "base")
    answered = CliRunner().invoke(
        cli.app, ["generate", "../adapter", "--prompt", "import", "--max-new-tokens", "2", "--device", "cpu"]
    )
    assert answered.exit_code == 0, answered.output
