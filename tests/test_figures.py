"""The figure shows what the JSON files hold, and its file appears whole or not at all."""

import copy
from typing import Any

import pytest

from hf_sparse import figures
from hf_sparse.errors import DataError
from hf_sparse.figures import quality_figure

EVALUATION: dict[str, Any] = {
    "budget": {"slots": 256},
    "text": {"chunks": 24, "length": 2048},
    "perplexity": {"dense": 9.812, "recency": 10.934, "random": 11.402, "learned": 10.071},
}
TRAINING: dict[str, Any] = {
    "history": [
        *({"step": i, "stage": "attention", "loss": 3 - i / 20} for i in range(1, 41)),
        *({"step": i, "stage": "distill", "loss": 2 / i} for i in range(41, 341)),
    ]
}


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """Every matplotlib figure that is saved."""
    from matplotlib.figure import Figure

    seen: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (seen.append(self), save(self, *args, **kwargs))
    )
    return seen


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def test_perplexity(drawn, tmp_path):
    quality_figure(EVALUATION, None, tmp_path / "q.png")
    (axes,) = drawn[0].axes
    assert texts(axes) == ["10.07  (+2.6 %)", "10.93  (+11.4 %)", "11.40  (+16.2 %)", "dense (all keys) 9.81"]
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert dots == [10.071, 10.934, 11.402]
    assert "256 KV slots" in axes.get_title(loc="left") and "24 × 2048 tokens" in axes.get_xlabel()
    low, high = axes.get_xlim()
    assert low < 9.812 and high > 11.402
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # learned on top


def test_embedding_similarity(drawn, tmp_path):
    values = {"dense": 1.0, "window": 0.8927, "random": 0.8175, "learned": 0.92412}
    evaluation = {**EVALUATION, "metric": "embedding_similarity", "embedding_similarity": values}
    quality_figure(evaluation, TRAINING, tmp_path / "q.png")
    axes, _, distill = drawn[0].axes
    assert texts(axes) == ["0.9241", "0.8927", "0.8175", "dense (all keys) 1.0000"]
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "nearest"
    assert max(axes.get_xticks()) <= 1 and "higher is better" in axes.get_xlabel()
    assert "256 keys per query" in axes.get_title(loc="left") and "cosine" in distill.get_ylabel()


def test_masked_perplexity(drawn, tmp_path):
    evaluation = {**EVALUATION, "metric": "masked_perplexity", "masked_perplexity": {"dense": 8.0, "learned": 10.0}}
    quality_figure(evaluation, TRAINING, tmp_path / "q.png")
    assert texts(drawn[0].axes[0])[0] == "10.00  (+25.0 %)" and "masked token" in drawn[0].axes[0].get_xlabel()
    assert "nats" in drawn[0].axes[2].get_ylabel()


def test_training_has_a_panel_per_stage(drawn, tmp_path):
    quality_figure(EVALUATION, TRAINING, tmp_path / "both.png")
    quality_figure(EVALUATION, None, tmp_path / "one.png")
    _, attention, distill = drawn[0].axes
    assert attention.get_ylabel() == "squared error of scores" and "nats" in distill.get_ylabel()
    raw, smooth = (line.get_xydata() for line in distill.lines)
    assert raw.tolist() == [[row["step"], row["loss"]] for row in TRAINING["history"][40:]]
    assert smooth[:, 1].min() >= raw[:, 1].min() and smooth[:, 1].max() <= raw[:, 1].max()
    assert distill.get_ylim()[0] == 0
    assert size(tmp_path / "both.png")[0] > size(tmp_path / "one.png")[0] >= 1000


@pytest.mark.parametrize(
    "perplexity",
    [
        {"learned": 9.8},  # only this one was measured
        {"dense": 9.81, "learned": 9.79, "random": 512.0},  # better than dense, and one far away
        {"dense": 9.81, "recency": 9.81, "random": 9.81, "learned": 9.81},
    ],
)
def test_unusual_values(perplexity, drawn, tmp_path):
    quality_figure({**EVALUATION, "perplexity": perplexity}, {"history": TRAINING["history"][:1]}, tmp_path / "q.png")
    assert len(texts(drawn[0].axes[0])) == len(perplexity)
    low, high = drawn[0].axes[0].get_xlim()
    assert all(low < value < high for value in perplexity.values())


def test_same_input_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        quality_figure(EVALUATION, TRAINING, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_settings_of_the_caller_stay(tmp_path):
    from matplotlib import rcParams

    before = dict(rcParams)
    quality_figure(EVALUATION, TRAINING, tmp_path / "q.png")
    assert dict(rcParams) == before


@pytest.mark.parametrize(
    ("evaluation", "training", "name"),
    [
        ({}, None, r"eval\.json"),
        ({**EVALUATION, "perplexity": {"learned": "low"}}, None, r"eval\.json"),
        ({**EVALUATION, "perplexity": {"learned": float("inf")}}, None, r"eval\.json"),
        ({**EVALUATION, "metric": "beauty"}, None, r"eval\.json"),
        ({**EVALUATION, "metric": "masked_perplexity"}, None, r"eval\.json"),
        (EVALUATION, {}, r"finetune\.json"),
        (EVALUATION, {"history": [{"step": 1, "stage": "lm"}]}, r"finetune\.json"),
    ],
)
def test_damaged_measurement(evaluation, training, name, tmp_path):
    with pytest.raises(DataError, match=f"{name} is not what hf-sparse writes"):
        quality_figure(copy.deepcopy(evaluation), training, tmp_path / "q.png")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "q.png"
    path.write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(figures.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        quality_figure(EVALUATION, None, path)
    assert [p.name for p in tmp_path.iterdir()] == ["q.png"] and path.read_bytes() == b"old"
