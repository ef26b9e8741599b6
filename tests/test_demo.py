"""The demo, with few steps and little text: what it writes is complete, and what it says is what it measured."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse.demo import CHECKPOINT
from hf_sparse.demo import run as demo
from hf_sparse.evaluation import perplexity

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "eval.json", "finetune.json", "quality.png"}
FILES |= {"report.html", "figures", "selection.json"}

pytestmark = pytest.mark.usefixtures("blank_pictures_in_module")


def tell(output, steps=2, seed=0):
    console = Console(width=120, file=io.StringIO())
    evaluation = demo.run(output, steps, seed, console)
    return evaluation, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo, "EVALUATION_CHUNKS", 2)
        monkeypatch.setattr(demo, "EVALUATION_LENGTH", 256)
        monkeypatch.setattr(demo, "TRAINING_LENGTH", 128)
        monkeypatch.setattr(demo, "EVERY_NTH_DOCUMENT", 50)
        monkeypatch.setattr(demo, "REPORT_CHUNKS", ":1")
        monkeypatch.setattr(demo, "NEW_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def told(_small, tmp_path_factory):
    """The folder, the result and the words of one demo."""
    output = tmp_path_factory.mktemp("demo") / "new" / "demo-output"
    return output, *tell(output)


def test_a_whole_repository(told):
    output, evaluation, words = told
    assert {path.name for path in output.iterdir()} == FILES
    written = json.loads((output / "eval.json").read_text())
    assert written == evaluation | {name: written[name] for name in ("weights_sha256", "settings_sha256")}
    assert list(output.parent.iterdir()) == [output]  # nothing temporary is left
    assert "demo-output" in (output / "README.md").read_text()
    training = json.loads((output / "finetune.json").read_text())
    assert [row["stage"] for row in training["history"]][-2:] == ["distill", "distill"]
    assert f"{training['tokens']:,} tokens" in words


def test_says_what_it_measured(told):
    _, evaluation, words = told
    assert tuple(evaluation["perplexity"]) == ("dense", "recency", "snapkv", "random", "learned")
    for value in evaluation["perplexity"].values():
        assert f"{value:.2f}" in words
    assert re.search(r"by the untrained scorer .*\d\.\d\d .*[+-]\d", words)
    longer = re.search(r"by a scorer trained for longer .* 64 on average \S+ +(\d+\.\d\d) ", words)
    assert longer and float(longer[1]) < evaluation["perplexity"]["recency"]
    assert "hf-sparse push" in words


def test_compares_with_the_published_adapter():
    published = Path(__file__).parents[1] / "model_cards" / "demo-llama-sparsek-64"
    for file in sorted(demo.PUBLISHED.iterdir()):
        assert file.read_bytes() == (published / file.name).read_bytes()
    assert json.loads((published / "finetune.json").read_text())["tokens"] == demo.PUBLISHED_TOKENS


@pytest.mark.full
def test_the_adapter_is_the_one_that_was_measured(told):
    output, evaluation, _ = told
    model = hf_sparse.from_pretrained(output, dtype=torch.float32)
    assert model.active_peft_config.base_model_name_or_path == "demo"
    held_out = demo._held_out(AutoTokenizer.from_pretrained(CHECKPOINT))
    learned = perplexity(model, held_out, batch_size=demo.EVALUATION_BATCH)
    assert learned == pytest.approx(evaluation["perplexity"]["learned"], rel=1e-5)


@pytest.mark.full
def test_one_seed_one_result(told):
    output, evaluation, _ = told
    (output / "quality.png").unlink()
    again, _ = tell(output)  # replaces the earlier one
    assert again["perplexity"] == evaluation["perplexity"]
    assert {path.name for path in output.iterdir()} == FILES


def test_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no adapter that the demo could replace"):
        tell(tmp_path)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        tell(tmp_path / "new", steps=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_demo_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_held_out", interrupted)  # the adapter is made by then
    with pytest.raises(KeyboardInterrupt):
        tell(tmp_path / "demo-output")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dense", "recency", "learned", "said"),
    [(10, 14, 11, "closes 75% of the gap"), (10, 14, 15, "no better than"), (10, 14, 14, "no better than")],
)
def test_verdict(dense, recency, learned, said):
    assert said in demo._verdict(dense, recency, learned)
