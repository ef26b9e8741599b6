"""The report shows what was measured, names what was not, and needs nothing but itself."""

import base64
import copy
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_sparse
from hf_sparse import cli
from hf_sparse.adapters import report
from hf_sparse.adapters.load import load_adapter
from hf_sparse.adapters.report import write_report
from hf_sparse.data import pack
from hf_sparse.errors import DataError, HubError
from hf_sparse.evaluation import evaluate
from hf_sparse.workflow import create_adapter

pytestmark = pytest.mark.usefixtures("blank_pictures")

BUDGET = {"k": 5, "window": 6, "sinks": 2, "slots": 13}
LENGTH = 40
HEAT = {"lengths": [64, 128], "depths": [0.0, 1.0], "values": [[1.0, 0.5], [0.75, 0.0]]}
EVALUATION: dict[str, Any] = {
    "format": 1,
    "base_model": "me/llama",
    "budget": BUDGET,
    "text": {"name": "held <out>", "sha256": "c0ffee", "chunks": 24, "length": 2048, "predicted_tokens": 49128},
    "metric": "perplexity",
    "perplexity": {"dense": 9.812, "recency": 10.934, "h2o": 10.5, "oracle": 9.9, "learned": 10.071},
    "kv_bytes": {"dense": 8388608, "sparse": 1048576, "sparse_bookkeeping": 49152, "tokens": 2048},
    "tokens_per_second": {"dense": 61.24, "sparse": 74.91, "new_tokens": 64},
    "machine": {"system": "Linux", "cpus": 4},
    "versions": {"python": "3.11.7", "hf-sparse": "0.1.0"},
}
FULL: dict[str, Any] = {
    **EVALUATION,
    "divergence": {"dense": 0.0, "recency": 0.2, "h2o": 0.1, "oracle": 0.01, "learned": 0.04},
    "by_position": {"edges": [1, 512, 2048], "dense": [12.0, 10.0], "learned": [12.0, 10.5]},
    "sweep": [{**BUDGET, "slots": 26, "perplexity": {"dense": 9.812, "recency": 10.2, "learned": 9.9}}],
    "tasks": {
        "passkey": {"metric": "exact match", "settings": {"slots": 13}, "results": {"dense": HEAT, "learned": HEAT}},
        "my/task": {"metric": "F1", "settings": {}, "results": {"dense": 0.5, "learned": 0.4}},
    },
}
TRAINING: dict[str, Any] = {
    "format": 1,
    "objective": "distill",
    "settings": {"objective": "distill", "steps": 300, "length": 2048},
    "trainable_parameters": 3072,
    "all_parameters": 4096000,
    "tokens": 1392640,
    "seconds": 412.3,
    "history": [{"step": step, "stage": "distill", "loss": 1 / step} for step in range(1, 31)],
    "machine": {"system": "Linux"},
    "versions": {},
}
ENCODER: dict[str, Any] = {
    **{key: value for key, value in EVALUATION.items() if key not in ("perplexity", "kv_bytes")},
    "metric": "masked_perplexity",
    "masked_perplexity": {"dense": 9.8, "window": 11.0, "random": 12.0, "learned": 10.0},
    "tokens_per_second": {"dense": 61.24, "sparse": 74.91, "batch_size": 2, "length": 40},
}
TEXT = " ".join(f"w{random.Random(i).randrange(5, 64)}" for i in range(10 * LENGTH))


class Page(HTMLParser):
    """The tags, the words, and the images of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(self.source)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    @property
    def without_pictures(self) -> str:
        """The source, but for the bytes of pictures: they depend on the version that drew them."""
        return re.sub(r"(data:image/png;base64,)[^\"]*", r"\1...", self.source)

    @property
    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.split(",")[1]) for source in sources]


@pytest.fixture
def folder(tmp_path, tiny_llama, bert_tokenizer) -> Path:
    return adapter(tmp_path, tiny_llama(), bert_tokenizer)


def adapter(tmp_path: Path, base: Any, tokenizer: Any) -> Path:
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = hf_sparse.SparseKConfig(k=5, window=6, sinks=2)
    create_adapter(str(tmp_path / "base"), config, tmp_path / "adapter")
    return tmp_path / "adapter"


def measured(folder: Path, evaluation: Any, training: Any = None) -> Path:
    (folder / "eval.json").write_text(json.dumps(evaluation), "utf-8")
    if training is not None:
        (folder / "finetune.json").write_text(json.dumps(training), "utf-8")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_everything(folder):
    path = write_report(measured(folder, FULL, TRAINING), TEXT, "words.txt", length=LENGTH)
    page, pictures = Page(path), {p.stem: p.read_bytes() for p in (folder / "figures").iterdir()}
    assert path == folder / "report.html"
    tasks = {"task-passkey", "task-my-task"}
    assert set(pictures) == {"quality", "budgets", "divergence", "positions", "heads", "tokens", "training"} | tasks
    # The tokens are on the page as text.
    assert sorted(page.images) == sorted(png for name, png in pictures.items() if name != "tokens")
    for shown in ("10.07", "+2.6 %", "0.0400", "9.90", "held <out>", "words.txt", "61.2", "8.0 MiB"):
        assert shown in page.words, shown


def test_budgets_of_heads(tmp_path, tiny_llama, bert_tokenizer):
    """An adapter whose heads have budgets of their own has a picture of them, and no other adapter."""
    folder = adapter(tmp_path, tiny_llama(), bert_tokenizer)
    content = json.loads((folder / "adapter_config.json").read_text())
    heads, layers = (content["base_shape"][name] for name in ("num_key_value_heads", "num_attention_layers"))
    shares = [[0.6, *[1.0] * (heads - 2), 1.4]] * layers
    (folder / "adapter_config.json").write_text(json.dumps({**content, "head_shares": shares}))
    page = Page(write_report(measured(folder, EVALUATION)))
    assert (folder / "figures" / "shares.png").is_file() and "13 keys on average" in page.words


def test_whole(folder, golden):
    """Without a text, whose kept tokens depend on how the versions at hand round."""
    golden("report/sparsek.html", Page(write_report(measured(folder, FULL, TRAINING))).without_pictures)


def test_what_evaluate_writes(folder):
    """The format is agreed between two packages; this holds them to it."""
    model, tokenizer = load_adapter(folder, device="cpu")
    chunks = pack(tokenizer, TEXT, LENGTH)[:1]
    chosen = ("dense", "recency", "learned")
    evaluation = evaluate(model, chunks, selections=chosen, slots=[8, 20], speed_tokens=2, progress=False)
    page = Page(write_report(measured(folder, evaluation)))
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    assert drawn == {"quality", "budgets", "divergence", "positions"}
    assert all(f"{row['perplexity']['learned']:.2f}" in page.words for row in evaluation["sweep"])


def test_self_contained(folder):
    page = Page(write_report(measured(folder, FULL, TRAINING), TEXT, length=LENGTH))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert not [attributes for _, attributes in page.tags if "href" in attributes or "srcset" in attributes]
    for outside in ("http:", "https:", "url(", "@import", str(folder)):
        assert outside not in page.source.replace("data:image/png", ""), outside


def test_what_is_missing_is_named_with_its_command(folder, golden):
    page = Page(write_report(measured(folder, EVALUATION)))
    golden("report/sparsek-little-measured.html", page.without_pictures)
    assert [path.name for path in (folder / "figures").iterdir()] == ["quality.png"]
    assert len(page.images) == 1 and not (folder / "selection.json").exists()


def test_kept_tokens_as_text(folder):
    write_report(measured(folder, EVALUATION), TEXT, "words.txt", length=LENGTH, chunks="1:3")
    selection = json.loads((folder / "selection.json").read_text())
    page = Page(folder / "report.html")
    assert selection["text"]["chunks"] == 2 and selection["text"]["name"] == "words.txt (chunks 1:3)"
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    kept = [count for _, count in selection["tokens"] if count]
    assert [span["class"] for span in spans] == [f"k{count}" for count in kept]
    assert "".join(piece for piece, _ in selection["tokens"]) in page.words
    assert all(f".k{count} {{ background:" in page.source for count in kept)


def test_markup_in_a_text_is_text(folder):
    write_report(measured(folder, EVALUATION), TEXT, length=LENGTH)
    selection = json.loads((folder / "selection.json").read_text())
    selection["tokens"][:2] = [["<script>", 4], ["</div>&amp;", 0]]
    (folder / "selection.json").write_text(json.dumps(selection))
    page = Page(write_report(folder))
    assert "<script></div>&amp;" in page.words and "script" not in {tag for tag, _ in page.tags}


def test_what_scorers_kept_is_shown_again_until_they_change(folder, monkeypatch):
    write_report(measured(folder, EVALUATION), TEXT, length=LENGTH)
    before = files(folder)
    monkeypatch.setattr(report, "load_adapter", None)  # no model is needed
    write_report(folder)
    assert files(folder) == before
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    page = Page(write_report(folder))
    assert not [tag for tag, attributes in page.tags if tag == "span" and "title" in attributes]  # no kept tokens
    assert [path.name for path in (folder / "figures").iterdir()] == ["quality.png"]


def test_pictures_that_are_no_longer_true_go_and_others_stay(folder):
    write_report(measured(folder, FULL))
    (folder / "figures" / "mine.png").write_bytes(b"mine")
    (folder / "figures" / "heads.txt").write_bytes(b"mine")
    write_report(measured(folder, EVALUATION))
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["heads.txt", "mine.png", "quality.png"]


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_encoder(tmp_path, tiny_bert, bert_tokenizer, kind, golden):
    evaluation = ENCODER
    if kind == "BertModel":
        key = "embedding_similarity"
        evaluation = {**ENCODER, "metric": key, key: {"dense": 1.0, "window": 0.8, "random": 0.7, "learned": 0.9}}
        del evaluation["masked_perplexity"]
    folder = measured(adapter(tmp_path, tiny_bert(kind), bert_tokenizer), evaluation, TRAINING)
    page = Page(write_report(folder, TEXT, length=LENGTH))
    assert "KV" not in page.words and "slots" not in page.words.replace("--slots", "")
    assert "[CLS]" in page.words and "13 keys" in page.words
    if kind == "BertForMaskedLM":
        (folder / "selection.json").unlink()
        golden("report/encoder.html", Page(write_report(folder)).without_pictures)


def damaged(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(FULL), **changes}


@pytest.mark.parametrize(
    ("evaluation", "training", "message"),
    [
        (damaged(budget={**BUDGET, "k": 6}), None, "of the budget .* but the adapter has"),
        (damaged(metric="beauty"), None, r"eval\.json is not what hf-sparse writes"),
        (damaged(machine=None), None, r"eval\.json, .* is not what hf-sparse writes"),
        (damaged(perplexity={"learned": "low"}), None, r"eval\.json is not what hf-sparse writes"),
        (damaged(tasks={"t": {}}), None, r"eval\.json is not what hf-sparse writes"),
        (damaged(sweep=[{}]), None, r"eval\.json is not what hf-sparse writes"),
        (FULL, {**TRAINING, "history": [{}]}, r"finetune\.json is not what hf-sparse writes"),
    ],
)
def test_damage_leaves_the_old_report(folder, evaluation, training, message):
    write_report(measured(folder, EVALUATION))
    before = files(measured(folder, evaluation, training))
    with pytest.raises(DataError, match=message):
        write_report(folder, TEXT, length=LENGTH)
    assert files(folder) == before


def test_damaged_json(folder):
    (folder / "eval.json").write_text("{")
    with pytest.raises(DataError, match=r"eval\.json is damaged"):
        write_report(folder)


def test_text_that_is_too_short_writes_nothing(folder):
    before = files(measured(folder, EVALUATION))
    with pytest.raises(DataError, match="nothing is evicted"):
        write_report(folder, TEXT, length=13)
    assert files(folder) == before


def test_no_adapter(tmp_path):
    with pytest.raises(HubError, match="not a complete adapter"):
        write_report(tmp_path)


class TestCommand:
    def invoke(self, *arguments: Any) -> Any:
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})

    def test_report(self, folder, tmp_path):
        (tmp_path / "words.txt").write_text(TEXT)
        options = ["--text", tmp_path / "words.txt", "--length", LENGTH, "--chunks", "0:1", "--device", "cpu"]
        result = self.invoke("report", measured(folder, EVALUATION), *options)
        assert result.exit_code == 0, result.output
        assert f"report.html and figures/ in {folder}" in result.stdout
        assert "words.txt (chunks 0:1)" in Page(folder / "report.html").words

    def test_without_measurements(self, folder):
        result = self.invoke("report", folder)
        assert result.exit_code == 1 and result.stderr.count("error: ") == 1 and "Traceback" not in result.output
        assert (
            f"has no eval.json, and a report shows what was measured: `hf-sparse eval {folder} --text" in result.stderr
        )
        assert not (folder / "report.html").exists() and not (folder / "figures").exists()
