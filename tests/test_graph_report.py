"""Card, figures and report of a Sparsefinder adapter: every number is from the JSON files."""

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hf_sparse
from hf_sparse.adapters.report import write_report
from hf_sparse.errors import DataError
from hf_sparse.hub import write_repo
from hf_sparse.methods.sparsefinder.evaluation import CONTENDERS, adapter_settings
from hf_sparse.methods.sparsefinder.figures import covered_figure, graphs_figure, pareto_figure, weights_figure
from hf_sparse.methods.sparsefinder.figures.looks import LOOKS as PATTERN_LOOKS
from hf_sparse.methods.sparsek.figures.looks import LOOKS
from hf_sparse.workflow import create_adapter

card_text = runpy.run_path(str(Path(__file__).with_name("cards.py")))["card_text"]
CONFIG = hf_sparse.SparsefinderConfig(tile=16, sparsity=0.7, length=256, window=24, clusters=6)


def measured(value: float, mass: float, sparsity: float = 0.71, **more: float) -> dict[str, float]:
    shares = {"sparsity": sparsity, "gold_sparsity": 0.93, "recall": mass / 2, "mass_recall": mass, "exact_rows": 0.3}
    return {"perplexity": value, "divergence": 0.1, **shares, "precision": 0.2, **more}


EVALUATION: dict[str, Any] = {
    "format": 1,
    "method": "sparsefinder",
    "base_model": "me/llama",
    "adapter": adapter_settings(CONFIG),
    "causal": True,
    "text": {"name": "held <out>", "sha256": "c0ffee", "chunks": 3, "length": 256, "predicted_tokens": 765},
    "metric": "perplexity",
    "graphs": "compounded",
    "rows": 200,
    "seed": 4,
    "dense": {"perplexity": 13.701, "divergence": 0.25},
    "full": measured(15.124, 1.0, 0.0),
    "layers": [0, 2],
    "gold_heads": [[0.9, 0.95], [0.8, 0.85]],
    "points": [
        {
            "sparsity": 0.5,
            "tiles_per_query": 5.0,
            "own": False,
            "results": {"predicted": measured(15.3, 0.95, 0.51), "oracle": measured(15.2, 0.98, 0.51)},
            "heads": {"mass_recall": [[0.9, 1.0], [0.95, 0.95]]},
        },
        {
            "sparsity": 0.7,
            "tiles_per_query": 3.0,
            "own": True,
            "results": {
                "predicted": measured(15.917, 0.873, certified_rows=0.123),
                "longformer": measured(17.5, 0.81),
                "oracle": measured(15.2, 0.91),
            },
            "heads": {"mass_recall": [[0.8, 0.9], [0.85, 0.95]]},
        },
    ],
    "machine": {"system": "Linux", "cpus": 4},
    "versions": {"python": "3.11.7", "hf-sparse": "0.1.0"},
}
TRAINING: dict[str, Any] = {
    "format": 1,
    "objective": "distill",
    "settings": {"objective": "distill", "steps": 60, "graph_steps": 40, "graph_loss": "info_nce", "length": 256},
    "trainable_parameters": 3072,
    "all_parameters": 4096000,
    "tokens": 25600,
    "seconds": 41.2,
    "history": [{"step": step, "stage": "distill" if step < 6 else "graph", "loss": 1 / step} for step in range(1, 11)],
    "scales": {"before": {"loss": 0.4321, "density": 0.1}, "after": {"loss": 0.2109, "density": 0.08}},
    "machine": {"system": "Linux", "cpus": 8},
    "versions": {},
}
GRAPHS: dict[str, Any] = {
    "text": {"name": "words"},
    "length": 4,
    "tile": 2,
    "heads": [
        {
            "layer": layer,
            "head": 1,
            "causal": True,
            "recall": 0.5,
            "mass_recall": 0.75,
            "predicted": [[0], [1]],
            "gold": [[0], [1], [0, 2], [3]],
        }
        for layer in (0, 2)
    ],
}
WEIGHTS: dict[str, Any] = {
    **GRAPHS,
    "weights": {
        "tokens": ["the", " apple tree of knowledge", "\n", " fell"],
        "heads": [
            {
                "layer": layer,
                "head": 1,
                "weights": [[[0, 1.0]], [[0, 0.25], [1, 0.75]], [[2, 1.0]], [[0, 0.5], [2, 0.1], [3, 0.4]]],
            }
            for layer in (0, 2)
        ],
    },
}


def card(config: Any = CONFIG, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "repo_id": "me/llama-graph",
        "base_model": "org/llama",
        "parameters": 3072,
        "evaluation": EVALUATION,
        "training": TRAINING,
    }
    return ModelCard(card_text(config, **values | changes))


def native() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Settings, eval.json and finetune.json of an adapter for a checkpoint that was trained with entmax."""
    config = hf_sparse.SparsefinderConfig(tile=16, sparsity=0.7, length=256, window=24, clusters=6, entmax_native=1.5)
    evaluation = {name: value for name, value in EVALUATION.items() if name != "dense"}
    training = {name: value for name, value in TRAINING.items() if name != "scales"} | {"objective": "graph"}
    return config, {**evaluation, "adapter": adapter_settings(config)}, training


def rows(text: str) -> list[list[str]]:
    return [[cell.strip(" *") for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line]


class TestCard:
    def test_metadata(self):
        data = card().data
        assert data.base_model == "org/llama" and data.library_name == "peft"
        assert {"hf-sparse", "sparsefinder", "sparse-attention"} <= set(data.tags) and "sparsek" not in data.tags

    def test_tables_hold_the_measurements(self):
        found = rows(card().text)
        assert [
            "predicted graph (this adapter)",
            "0.70",
            "15.92",
            "0.1000",
            "0.873",
            "0.436",
            "0.300",
            "0.123",
        ] in found
        assert ["window and global (Longformer)", "0.70", "17.50", "0.1000", "0.810", "0.405", "0.300"] in [
            row[:7] for row in found
        ]
        assert ["dense softmax (the base model)", "", "13.70", "0.2500"] in [row[:4] for row in found]
        assert ["share of the pairs of tiles that is left out", "0.7"] in found
        assert ["key tiles per query tile in a causal text", str(CONFIG.causal_tiles)] in found
        assert ["loss", "0.4321", "0.2109"] in found and ["graph_steps", "40"] in found

    def test_whole(self, golden):
        golden("card/sparsefinder.md", str(card()))

    def test_a_checkpoint_that_was_trained_with_entmax(self, golden):
        """Nothing is called dense, nor compared with softmax; the row of full entmax is the base model."""
        config, evaluation, training = native()
        text = card(config, evaluation=evaluation, training=training).text
        golden("card/sparsefinder-entmax-native-measured.md", text)
        assert "dense" not in text and "logit scales" not in text and "before | after" not in text
        assert ["full entmax (the base model)", "", "15.12"] in [row[:3] for row in rows(text)]

    def test_no_measurement_no_numbers(self, golden):
        text = card(evaluation=None, training=None).text
        assert "pareto.png" not in text and not re.search(r"\d %", text)
        golden("card/sparsefinder-unmeasured.md", text)

    @pytest.mark.parametrize(
        "settings, name",
        [
            ({"predictor": "full"}, "card/sparsefinder-full.md"),
            ({"predictor": "bound"}, "card/sparsefinder-bound.md"),
            ({"predictor": "pooled"}, "card/sparsefinder-pooled.md"),
            ({"predictor": "quantization"}, "card/sparsefinder-quantization.md"),
            ({"predictor": "distance", "tile": None}, "card/sparsefinder-distance-of-tokens.md"),
            ({"tiles_per_query": 7}, "card/sparsefinder-seven-tiles.md"),
            ({"query_tile": 1}, "card/sparsefinder-list-per-query.md"),
            ({"rank": 8, "cluster_parts": 4}, "card/sparsefinder-parts.md"),
            ({"learn_alpha": True}, "card/sparsefinder-learned-alpha.md"),
            ({"complete": True}, "card/sparsefinder-complete.md"),
            ({"layers": [3]}, "card/sparsefinder-some-layers.md"),
            ({"entmax_native": 2.0}, "card/sparsefinder-entmax-native.md"),
        ],
        ids=str,
    )
    def test_settings(self, settings, name, golden):
        text = card(hf_sparse.SparsefinderConfig(**settings), evaluation=None).text
        golden(name, text)
        assert ("complete=True" in text) == (
            "complete" not in settings and settings.get("predictor") not in ("full", "bound")
        )

    @pytest.mark.parametrize("model_class", ["BertModel", "BertForMaskedLM", "LlamaForCausalLM"])
    def test_the_example_is_python(self, model_class):
        kind = "llama" if model_class.startswith("Llama") else "bert"
        config = hf_sparse.SparsefinderConfig(base_shape={"model_type": kind})
        text = card(config, model_class=model_class, evaluation=None, training=None).text
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        compile(code, "card", "exec")
        assert code.startswith("import hf_sparse") and "KeyError: 'HF_SPARSE_SPARSEFINDER'" in text
        assert ("KV cache" in text) == ("generate" in code) == (kind == "llama")

    @pytest.mark.parametrize("missing", ["full", "points", "text", "rows", "machine", "dense"])
    def test_incomplete_measurement(self, missing):
        broken = {key: value for key, value in EVALUATION.items() if key != missing}
        with pytest.raises(DataError, match=f"is not what hf-sparse writes: .*{missing}"):
            card(evaluation=broken)


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    from matplotlib.figure import Figure

    seen: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (seen.append(self), save(self, *args, **kwargs))
    )
    return seen


class TestFigures:
    def test_pareto(self, drawn, tmp_path):
        pareto_figure(EVALUATION, tmp_path / "p.png")
        mass, recall, quality, rest = drawn[0].axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in mass.lines}
        assert lines["predicted graph"] == [[0.51, 0.95], [0.71, 0.873]]
        assert lines["window and global (Longformer)"] == [[0.71, 0.81]]
        assert [line.get_ydata()[0] for line in recall.lines if line.get_label() == "most mass (oracle)"] == [0.49]
        levels = {line.get_label(): line.get_ydata()[0] for line in quality.lines}
        assert levels["full entmax (all keys)"] == 15.124 and levels["dense softmax (base model)"] == 13.701
        names = [text.get_text() for text in rest.get_legend().get_texts()]
        assert names[0] == "predicted graph" and len(names) == 6
        assert "lower is better" in quality.get_ylabel() and "3 × 256 tokens" in drawn[0].get_suptitle()

    def test_pareto_of_a_checkpoint_that_was_trained_with_entmax(self, drawn, tmp_path):
        pareto_figure(native()[1], tmp_path / "p.png")
        labels = {line.get_label() for line in drawn[0].axes[2].lines}
        assert "full entmax (all keys)" in labels and not any("dense" in label for label in labels)

    def test_heads(self, drawn, tmp_path):
        covered_figure(EVALUATION, tmp_path / "c.png")
        mass, gold, *_ = drawn[0].axes
        assert mass.images[0].get_array().tolist() == [[0.8, 0.9], [0.85, 0.95]]  # of the adapter's own settings
        assert gold.images[0].get_array().tolist() == EVALUATION["gold_heads"]
        assert [tick.get_text() for tick in mass.get_yticklabels()] == ["0", "2"]

    def test_graphs(self, drawn, tmp_path):
        graphs_figure(GRAPHS, tmp_path / "g.png")
        panels = [axes for axes in drawn[0].axes if axes.images and axes.get_visible()]
        assert [axes.get_title("left").splitlines()[0] for axes in panels] == ["layer 0, head 1", "layer 2, head 1"]
        image = panels[0].images[0].get_array()
        colours = [["".join(f"{round(255 * c):02x}" for c in pixel) for pixel in row] for row in image.tolist()]
        white, predicted, held, missed = "ffffff", "bcd7ea", "222222", "d55e00"
        assert colours == [
            [held, white, white, white],
            [predicted, held, white, white],
            [missed, white, held, white],
            [white, white, predicted, held],
        ]

    def test_graphs_of_single_queries(self, drawn, tmp_path):
        heads = [head | {"predicted": [[0], [0], [1], [0, 1]]} for head in GRAPHS["heads"]]
        graphs_figure({**GRAPHS, "query_tile": 1, "heads": heads}, tmp_path / "g.png")
        (image, *_) = [axes.images[0].get_array() for axes in drawn[0].axes if axes.images and axes.get_visible()]
        assert [[round(float(pixel.sum()), 2) < 3 for pixel in row] for row in image] == [
            [True, False, False, False],
            [True, True, False, False],
            [True, False, True, False],  # the first one has weight, and is missed
            [True, True, True, True],
        ]

    def test_weights(self, drawn, tmp_path):
        weights_figure(WEIGHTS, tmp_path / "w.png")
        first, second, bar = [axes for axes in drawn[0].axes if axes.get_visible()]
        assert [axes.get_title("left") for axes in (first, second)] == ["layer 0, head 1", "layer 2, head 1"]
        labels = ["the", "apple tree …", "\\n", "fell"]
        assert [label.get_text() for label in first.get_yticklabels()] == labels
        assert [label.get_text() for label in second.get_xticklabels()] == labels
        shown = first.images[0].get_array()
        assert (~shown.mask).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]]
        assert shown[1, 1] == 0.75 and shown[3, 2] == 0.1
        colours = first.images[0].cmap(first.images[0].norm([0.0001, 1.0]))
        assert colours[0, :3].max() - colours[0, :3].min() > 0.05  # the smallest weight does not look like none
        assert "white is exactly 0" in bar.get_xlabel() and "first 4 tokens" in drawn[0].get_suptitle()

    def test_every_pattern_has_a_look_of_its_own(self):
        assert tuple(PATTERN_LOOKS.by_name) == CONTENDERS
        for what in ("label", "colour", "marker"):
            assert len({getattr(look, what) for look in PATTERN_LOOKS.by_name.values()}) == len(CONTENDERS)
        assert PATTERN_LOOKS.of("predicted").colour == LOOKS.of("learned").colour

    @pytest.mark.parametrize(
        "draw, content, name",
        [
            (pareto_figure, {}, "eval"),
            (pareto_figure, {**EVALUATION, "points": []}, "eval"),
            (pareto_figure, {**EVALUATION, "metric": "beauty"}, "eval"),
            (covered_figure, {**EVALUATION, "points": [{"own": True}]}, "eval"),
            (graphs_figure, {**GRAPHS, "heads": []}, "graphs"),
            (graphs_figure, {**GRAPHS, "heads": [{"layer": 0}]}, "graphs"),
            (weights_figure, GRAPHS, "graphs"),
            (weights_figure, {"weights": {"tokens": ["a"], "heads": []}}, "graphs"),
            (weights_figure, {"weights": {"tokens": ["a"], "heads": [{"layer": 0, "weights": [[[1, 1]]]}]}}, "graphs"),
        ],
    )
    def test_damaged_measurement(self, draw, content, name, tmp_path):
        with pytest.raises(DataError, match=rf"{name}\.json is not what hf-sparse writes"):
            draw(copy.deepcopy(content), tmp_path / "p.png")
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    create_adapter("demo", copy.deepcopy(CONFIG), folder)
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    (folder / "finetune.json").write_text(json.dumps(TRAINING))
    return folder


@pytest.mark.usefixtures("blank_pictures")
class TestReport:
    def test_page(self, folder, golden):
        page = write_report(folder).read_text("utf-8")
        assert {path.name for path in (folder / "figures").iterdir()} == {"pareto.png", "covered.png", "training.png"}
        assert page.count("data:image/png;base64,") == 3 and "<script" not in page
        assert "15.92" in page and "0.873" in page and "held &lt;out&gt;" in page
        golden("report/sparsefinder.html", re.sub(r"(data:image/png;base64,)[^\"]*", r"\1...", page))

    def test_page_of_a_checkpoint_that_was_trained_with_entmax(self, tmp_path):
        config, evaluation, training = native()
        create_adapter("demo", config, tmp_path / "adapter")
        for name, content in (("eval", evaluation), ("finetune", training)):
            (tmp_path / "adapter" / f"{name}.json").write_text(json.dumps(content))
        page = write_report(tmp_path / "adapter").read_text("utf-8")
        assert "full entmax (the base model)" in page and "dense" not in page.lower()

    def test_page_with_graphs_and_weights(self, folder, golden):
        from hf_sparse.adapters.folder import AdapterFolder

        (folder / "graphs.json").write_text(json.dumps(AdapterFolder(folder).note_details(WEIGHTS)))
        page = write_report(folder).read_text("utf-8")
        assert {"graphs.png", "weights.png"} <= {path.name for path in (folder / "figures").iterdir()}
        golden("report/sparsefinder-graphs.html", re.sub(r"(data:image/png;base64,)[^\"]*", r"\1...", page))

    def test_text_adds_graphs_that_stay_with_the_adapter(self, folder):
        from hf_sparse.adapters.load import load_adapter
        from hf_sparse.adapters.saving import save_adapter
        from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
        from hf_sparse.patches import sparse_layers

        words = " ".join(f"The {number} apples fell from the tree." for number in range(200))
        model, tokenizer = load_adapter(folder, device="cpu")
        ids = tokenizer(words, return_tensors="pt")["input_ids"][:, :128]
        fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(input_ids=ids))
        save_adapter(model, folder)
        page = write_report(folder, words, "apples", length=64, device="cpu").read_text("utf-8")
        assert "figures/" not in page and "the first 64 tokens of apples" in page
        details = json.loads((folder / "graphs.json").read_text())
        assert details["length"] == 64 and len(details["weights"]["tokens"]) == 32
        assert "".join(details["weights"]["tokens"]).startswith(words[:20])
        assert "apples" in write_report(folder).read_text("utf-8") and (folder / "figures" / "graphs.png").exists()
        create_adapter("demo", copy.deepcopy(CONFIG), folder, seed=1, force=True)
        (folder / "eval.json").write_text(json.dumps(EVALUATION))
        assert "apples" not in write_report(folder).read_text("utf-8")
        assert not list((folder / "figures").glob("[gw]*.png"))

    @pytest.mark.parametrize("missing", ["full", "text", "versions"])
    def test_damaged_measurement(self, folder, missing):
        broken = {key: value for key, value in EVALUATION.items() if key != missing}
        (folder / "eval.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match="is not what hf-sparse writes"):
            write_report(folder)
        assert not (folder / "report.html").exists()


@pytest.mark.usefixtures("blank_pictures")
class TestFolder:
    def test_card_and_figure(self, folder):
        write_repo(folder)
        assert "15.92" in (folder / "README.md").read_text() and (folder / "pareto.png").exists()
        assert not (folder / "quality.png").exists()

    @pytest.mark.parametrize(
        "changes, message",
        [
            (
                {"adapter": {**EVALUATION["adapter"], "clusters": 7}},
                "settings {'clusters': 7}, .* has {'clusters': 6}",
            ),
            ({"adapter": {}}, "is of the settings {}"),
            ({"method": None}, "not of a Sparsefinder adapter"),
        ],
        ids=["clusters", "none", "method"],
    )
    def test_measurement_of_another_adapter(self, folder, changes, message):
        (folder / "eval.json").write_text(json.dumps({**EVALUATION, **changes}))
        for act in (write_repo, write_report):
            with pytest.raises(DataError, match=message):
                act(folder)
        assert not (folder / "README.md").exists()
