"""The figures show what the JSON files hold, and each file appears whole or not at all."""

import copy
from typing import Any

import pytest

from hf_sparse.errors import DataError
from hf_sparse.figures import style, training_figure
from hf_sparse.methods.sparsek.baselines import BASELINES
from hf_sparse.methods.sparsek.figures import (
    budgets_figure,
    divergence_figure,
    heads_figure,
    positions_figure,
    quality_figure,
    shade,
    shares_figure,
    task_figure,
    tokens_figure,
)
from hf_sparse.methods.sparsek.figures.kept import legend_of
from hf_sparse.methods.sparsek.figures.looks import LOOKS, STAGES

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

SWEEP: dict[str, Any] = {
    **EVALUATION,
    "divergence": {"dense": 0.0, "recency": 0.21, "random": 0.35, "learned": 0.04},
    "sweep": [
        {
            "slots": 512,
            "perplexity": {"dense": 9.812, "recency": 10.2, "learned": 9.9},
            "divergence": {"dense": 0.0, "recency": 0.1, "learned": 0.02},
        },
        {"slots": 128, "perplexity": {"dense": 9.812, "recency": 12.0, "learned": 10.5}},
    ],
    "by_position": {"edges": [1, 512, 1024, 2048], "dense": [12.0, 10.0, 8.0], "learned": [12.0, 10.5, 9.0]},
}
HEAT = {"lengths": [512, 2048], "depths": [0.0, 0.5, 1.0], "values": [[1.0, 0.5], [0.75, 0.0], [1.0, 1.0]]}
SELECTION: dict[str, Any] = {
    "budget": {"slots": 6},
    "causal": True,
    "text": {"chunks": 2, "length": 16},
    "edges": [0, 4, 8, 16],
    "heads": [{"layer": layer, "head": head, "kept": [1.0, 0.25 * head, 0.5]} for layer in (0, 2) for head in (0, 1)],
    "tokens": [["The", 4], [" price", 0], [" is $5$", 1], ["\n", 2], ["\tgo 💡", 3]],
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

    monkeypatch.setattr(style.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        quality_figure(EVALUATION, None, path)
    assert [p.name for p in tmp_path.iterdir()] == ["q.png"] and path.read_bytes() == b"old"


class TestDots:
    def test_every_selection_has_a_row_in_a_fixed_order(self, drawn, tmp_path):
        values = {name: 10.0 + i for i, name in enumerate(("new_idea", "h2o", "learned", "recency", "dense"))}
        quality_figure({**EVALUATION, "perplexity": values}, None, tmp_path / "q.png")
        names = [label.get_text().replace("\n", " ") for label in drawn[0].axes[0].get_yticklabels()]
        assert names == [
            "best by learned score",
            "most recent (StreamingLLM)",
            "accumulated attention (H2O)",
            "new idea",
        ]

    def test_more_selections_make_it_higher(self, tmp_path):
        values = {"dense": 9.0, **{name: 10.0 for name in LOOKS.by_name}}
        quality_figure(EVALUATION, None, tmp_path / "few.png")
        quality_figure({**EVALUATION, "perplexity": values}, None, tmp_path / "many.png")
        assert size(tmp_path / "many.png")[1] > 1.3 * size(tmp_path / "few.png")[1]

    def test_divergence(self, drawn, tmp_path):
        divergence_figure(SWEEP, tmp_path / "d.png")
        assert texts(drawn[0].axes[0]) == ["0.04", "0.21", "0.35", "dense (all keys) 0"]
        assert "nats per token" in drawn[0].axes[0].get_xlabel() and "256 KV slots" in drawn[0].axes[0].get_title(
            "left"
        )


def test_every_baseline_has_a_look_of_its_own():
    assert set(BASELINES) <= set(LOOKS.by_name)
    looks = [look for name, look in LOOKS.by_name.items() if name != "window"]  # an encoder's, which has no recency
    for what in ("label", "colour", "marker"):
        assert len({getattr(look, what) for look in looks}) == len(looks)


class TestBudgets:
    def test_lines(self, drawn, tmp_path):
        budgets_figure(SWEEP, tmp_path / "b.png")
        quality, apart = drawn[0].axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in quality.lines}
        assert lines["best by learned score"] == [[128, 10.5], [256, 10.071], [512, 9.9]]
        assert lines["dense (all keys)"] == [[slots, 9.812] for slots in (128, 256, 512)]
        assert [tick.get_text() for tick in quality.get_xticklabels()] == ["128", "256", "512"]
        assert "KV slots" in quality.get_xlabel() and "lower is better" in quality.get_ylabel()
        kl = {line.get_label(): list(line.get_ydata()) for line in apart.lines}
        assert kl["most recent (StreamingLLM)"][1:] == [0.21, 0.1] and "dense (all keys)" not in kl
        assert "nats" in apart.get_ylabel()
        legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
        assert legend[0] == "best by learned score" and legend[-1] == "dense (all keys)" and len(legend) == 4

    def test_one_panel_without_divergence_and_no_kv_slots_in_an_encoder(self, drawn, tmp_path):
        key = "embedding_similarity"
        values = {"dense": 1.0, "window": 0.8, "learned": 0.9}
        sweep = [{"slots": 512, key: {"dense": 1.0, "window": 0.9, "learned": 0.95}}]
        budgets_figure({**EVALUATION, "metric": key, key: values, "sweep": sweep}, tmp_path / "b.png")
        (axes,) = drawn[0].axes
        assert axes.get_xlabel().startswith("keys per query") and "higher is better" in axes.get_ylabel()
        assert axes.get_yscale() == "linear"

    def test_far_values_get_a_logarithmic_axis(self, drawn, tmp_path):
        far = {**SWEEP["sweep"][0], "perplexity": {"dense": 9.8, "random": 400.0, "learned": 9.9}}
        budgets_figure({**SWEEP, "sweep": [far]}, tmp_path / "b.png")
        assert drawn[0].axes[0].get_yscale() == "log"


def test_positions(drawn, tmp_path):
    positions_figure(SWEEP, tmp_path / "p.png")
    values, change = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in values.lines}
    assert lines["best by learned score"] == [[256.5, 12.0], [768.0, 10.5], [1536.0, 9.0]]
    (learned,) = (line for line in change.lines if line.get_label() == "best by learned score")
    assert list(learned.get_ydata()) == pytest.approx([0.0, 5.0, 12.5])
    assert "tokens" in values.get_xlabel() and "%" in change.get_ylabel()


class TestTasks:
    def test_heat_map_for_each_selection(self, drawn, tmp_path):
        results = {"learned": HEAT, "h2o": HEAT, "dense": HEAT, "random": HEAT}
        task = {"metric": "exact match", "settings": {"slots": 512}, "results": results}
        task_figure("passkey", task, tmp_path / "t.png")
        panels = [axes for axes in drawn[0].axes if axes.images and axes.get_visible()]
        assert [axes.get_title("left") for axes in panels] == [
            "dense (all keys)",
            "best by learned score",
            "accumulated attention (H2O)",
            "chosen at random",
        ]
        assert panels[1].images[0].get_array().tolist() == HEAT["values"]
        assert texts(panels[1]) == ["1", "0.5", "0.75", "0", "1", "1"]
        assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["0%", "50%", "100%"]
        assert [tick.get_text() for tick in panels[3].get_xticklabels()] == ["512", "2,048"]
        assert "512 KV slots" in drawn[0].get_suptitle() and "tokens" in drawn[0].get_supxlabel()

    def test_one_heat_map_without_depths(self, drawn, tmp_path):
        results = {
            "dense": {"lengths": [512, 2048], "values": [1, 0.9]},
            "learned": {"lengths": [512, 2048], "values": [1, 0.5]},
        }
        task_figure("words", {"metric": "recall", "settings": {}, "results": results}, tmp_path / "t.png")
        axes = drawn[0].axes[0]
        assert axes.images[0].get_array().tolist() == [[1, 0.9], [1, 0.5]]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["dense (all keys)", "best by learned score"]

    def test_dots_for_numbers(self, drawn, tmp_path):
        task_figure(
            "hotpot", {"metric": "F1", "settings": {}, "results": {"dense": 0.5, "learned": 0.4}}, tmp_path / "t.png"
        )
        assert texts(drawn[0].axes[0]) == ["0.4", "dense (all keys) 0.5"]
        assert drawn[0].axes[0].get_xlim()[0] == 0 and "F1" in drawn[0].axes[0].get_xlabel()


def test_training_alone(drawn, tmp_path):
    training_figure(TRAINING, tmp_path / "t.png", states=True, stages=STAGES)
    assert [axes.get_title("left") for axes in drawn[0].axes] == ["Warm start", "Self-distillation"]
    assert "cosine" in drawn[0].axes[1].get_ylabel()
    training_figure(TRAINING | {"settings": {"lm_weight": 0.1}}, tmp_path / "t.png", stages=STAGES)
    assert drawn[1].axes[1].get_ylabel() == "KL from dense and what was added"
    training_figure(TRAINING | {"settings": {"lm_weight": 0.0}}, tmp_path / "t.png", stages=STAGES)
    assert drawn[2].axes[1].get_ylabel() == "KL from dense (nats per token)"


class TestKept:
    def test_heads(self, drawn, tmp_path):
        heads_figure(SELECTION, tmp_path / "h.png")
        axes, bar = drawn[0].axes
        assert axes.collections[0].get_array().reshape(4, 3).tolist() == [row["kept"] for row in SELECTION["heads"]]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "2"]
        assert axes.get_ylim() == (4, 0)  # the first layer on top
        assert "tokens" in axes.get_xlabel() and "KV heads" in axes.get_ylabel() and bar.get_ylabel() == "keys kept"

    def test_shares(self, drawn, tmp_path):
        counts = [[60, 200], [10, 130], [100, 100]]
        shares_figure(counts, tmp_path / "s.png")
        axes, bar = drawn[0].axes
        assert axes.collections[0].get_array().reshape(2, 3).tolist() == [[60, 10, 100], [200, 130, 100]]
        assert texts(axes) == ["60", "200", "10", "130", "100", "100"]
        assert axes.get_title("left") == "Keys that each KV head selects: 10 to 200, 100 on average"
        assert [label.get_text() for label in bar.get_yticklabels()] == ["10", "100", "200"]

    def test_no_kv_heads_in_an_encoder(self, drawn, tmp_path):
        heads_figure({**SELECTION, "causal": False}, tmp_path / "h.png")
        tokens_figure({**SELECTION, "causal": False}, tmp_path / "t.png")
        words = [text.get_text() for figure in drawn for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
        assert any("heads" in word for word in words) and not any("KV" in word for word in words)

    @pytest.mark.filterwarnings("error")  # a glyph that the font lacks
    def test_tokens(self, drawn, tmp_path):
        tokens_figure(SELECTION, tmp_path / "t.png")
        words = texts(drawn[0].axes[0])
        assert "How many of 4 KV heads keep each token" in words
        assert words[-5:] == ["The", " price", " is $5$", "↵", "    go ▯"]

    def test_of_a_long_text_the_middle_is_left_out(self, drawn, tmp_path):
        lines = [[f"line {i}\n", i % 5] for i in range(300)]
        tokens_figure({**SELECTION, "tokens": lines}, tmp_path / "long.png")
        words = texts(drawn[0].axes[0])
        shown = [word for word in words if word.startswith("line ")]
        assert shown[0].startswith("line 0") and shown[7].startswith("line 7") and shown[-1].startswith("line 299")
        assert len(shown) == 60 and "⋮   240 lines are left out here" in words
        places = [text.get_position()[1] for text in drawn[0].axes[0].texts if text.get_text().startswith("line ")]
        assert places == sorted(places) and len(set(places)) == 60

    def test_shades_are_in_order_and_readable(self):
        def light(colour: str) -> float:
            parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
            return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

        shades = [shade(kept, 16) for kept in range(17)]
        backs = [light(back) for back, _ in shades]
        assert backs == sorted(backs, reverse=True) and len(set(backs)) == 17
        for back, ink in shades:  # WCAG's ratio for text
            low, high = sorted((light(back), light(ink)))
            assert (high + 0.05) / (low + 0.05) >= 4.5

    @pytest.mark.parametrize("total", [1, 2, 16, 90, 256])
    def test_legend(self, total):
        kept = legend_of(total)
        assert kept[0] == 0 and kept[-1] == total and len(kept) <= 10 and kept == sorted(set(kept))


@pytest.mark.parametrize(
    ("draw", "content"),
    [
        (budgets_figure, {**SWEEP, "sweep": [{"slots": 128}, {}]}),
        (positions_figure, {**SWEEP, "by_position": {"edges": [1, 2], "dense": [1.0, 2.0]}}),
        (divergence_figure, {**SWEEP, "divergence": {"learned": None}}),
        (heads_figure, {**SELECTION, "heads": [{"layer": 0}]}),
        (tokens_figure, {**SELECTION, "tokens": []}),
        (lambda content, path: task_figure("t", content, path), {"metric": "m", "settings": {}, "results": {}}),
        (
            lambda content, path: task_figure("t", content, path),
            {"metric": "m", "settings": {}, "results": {"dense": {**HEAT, "values": [[1.0]]}}},
        ),
    ],
)
def test_damaged_content(draw, content, tmp_path):
    with pytest.raises(DataError, match=r"(eval|selection)\.json is not what hf-sparse writes"):
        draw(content, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
