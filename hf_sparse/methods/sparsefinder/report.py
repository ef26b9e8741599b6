"""Tell cards and reports of the measurements of a Sparsefinder adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_sparse.adapters.files import EVALUATION
from hf_sparse.adapters.method_report import Json, MethodReport, Picture, Pictures
from hf_sparse.errors import DataError
from hf_sparse.figures.style import reading
from hf_sparse.methods.sparsefinder import SparsefinderConfig
from hf_sparse.methods.sparsefinder.evaluation import adapter_settings, describe_graphs
from hf_sparse.methods.sparsefinder.figures import (
    covered_figure,
    graphs_figure,
    pareto_figure,
    weights_figure,
)
from hf_sparse.methods.sparsefinder.figures.covered import covered_point
from hf_sparse.methods.sparsefinder.figures.looks import LOOKS, STAGES
from hf_sparse.methods.sparsefinder.predictors import predictor_of
from hf_sparse.metrics import metric_of


class SparsefinderReport(MethodReport):
    """Show graphs of equal sparsity beside each other, and the predicted ones head by head."""

    name = "sparsefinder"
    templates = Path(__file__).parent
    figure = "pareto.png"
    details_file = "graphs.json"
    pictures = ("pareto", "covered", "graphs", "weights")
    objectives: ClassVar = {
        "graph": "The objective was to predict the entmax graph of the model itself from the projections; the logit "
        "scales stayed."
    }
    stages: ClassVar = STAGES

    def check(self, evaluation: Json, config: Any) -> None:
        if evaluation.get("method") != "sparsefinder":
            raise DataError(f"{EVALUATION} is not of a Sparsefinder adapter, but the adapter is one")
        settings, measured = adapter_settings(config), dict(evaluation.get("adapter") or {})
        different = [name for name in settings if name in measured and measured[name] != settings[name]]
        if different or not measured:
            of, here = ({name: values[name] for name in different} for values in (measured, settings))
            raise DataError(f"{EVALUATION} is of the settings {of}, but the adapter has {here}")

    def tags(self, both_ways: bool) -> Sequence[str]:
        return ("entmax",)

    def card(self, config: Any, evaluation: Json | None, both_ways: bool) -> Json:
        rows = _rows(evaluation) if evaluation else []
        return {"budget": _budget(config), "rows": rows, "learns_graph": predictor_of(config).learns_graph}

    def draw_figure(self, evaluation: Json, training: Json | None, path: Path) -> None:
        pareto_figure(evaluation, path)

    def describe(self, model: nn.Module, tokenizer: Any, chunks: Tensor, text_name: str) -> Json:
        return describe_graphs(model, chunks, tokenizer=tokenizer, text_name=text_name)

    def draw(self, pictures: Pictures, config: Any, evaluation: Json, details: Json | None) -> None:
        with reading(EVALUATION):
            predicted = any("heads" in point for point in evaluation["points"])
        pictures.add("pareto", "sparsity of every graph against recall and quality", pareto_figure, evaluation)
        if predicted:
            pictures.add("covered", "mass recall and gold sparsity of every head", covered_figure, evaluation)
        if details is not None:
            pictures.add("graphs", "predicted and gold graphs of single heads", graphs_figure, details)
            if "weights" in details:
                pictures.add("weights", "weights of single heads, with the tokens of a text", weights_figure, details)

    def report(self, evaluation: Json, details: Json | None, drawn: Sequence[Picture]) -> Json:
        return {"rows": _rows(evaluation), "verdict": _verdict(evaluation), "graphs": details}


def _budget(config: SparsefinderConfig) -> list[tuple[str, str]]:
    """List what a query attends to, by the settings of a Sparsefinder adapter."""
    first = [("first tokens of the text (global tokens)", str(config.global_tokens))]
    window = [("most recent tokens, in an encoder the nearest (window)", str(config.window)), *first]
    if config.predictor == "full":
        return [("keys", "all")]
    tile = "single tokens" if config.tile is None else f"{config.tile} tokens"
    how = {
        "clustering": _clusters(config),
        "quantization": f"{config.rank} x {config.bins} bins"
        if config.bin_kind == "shared"
        else f"bins of {config.bin_width} tokens",
        "distance": f"squared distance below {config.threshold:g}" if config.tile is None else "squared distance",
        "bound": "extremes of the keys of a tile",
        "pooled": f"means of {config.pool} keys, in texts of more than {config.exact_up_to} tokens",
    }[config.predictor]
    rows = [("predictor", f"{config.predictor}: {how}"), ("positions per tile", tile), *window]
    if config.rows != config.tile:
        rows[1:2] = [("keys per tile", tile), ("queries that have their list of tiles in common", str(config.rows))]
    if config.predictor == "pooled":
        rows.append(("key tiles that each query chooses for its tile of queries", f"**{config.choices}**"))
    elif config.tile is not None and config.predictor != "bound":
        if config.tiles_per_query is not None:
            rows.append(("key tiles per query tile, all counted", f"**{config.tiles_per_query}**"))
        else:
            rows.append(("share of the pairs of tiles that is left out", f"**{config.sparsity:g}**"))
            rows.append(("tokens of a causal text for which that holds", str(config.length)))
            rows.append(("key tiles per query tile in a causal text", str(config.causal_tiles)))
        if config.head_budgets:
            rows.append(("divided among heads and layers by what they miss, these being the mean", "yes"))
    return [*rows, ("completed to be exact", "yes" if config.complete else "no")]


def _clusters(config: SparsefinderConfig) -> str:
    """Describe the clusters of the predictor `clustering`."""
    if config.cluster_parts > 1:
        return f"{config.clusters} clusters in each of {config.cluster_parts} parts of the points"
    several = config.balanced or config.tile is None
    return f"{config.clusters} clusters, a token in {config.top_clusters if several else 1}"


def _rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str, dict[str, float]]]:
    """Return name, label, sparsity and measurements of each row of a table of graphs.

    Raises:
        KeyError, TypeError, ValueError: the content is not what hf-sparse writes.
    """
    if _native(evaluation):
        rows = [("full", "full entmax (the base model)", "", evaluation["full"])]
    else:
        rows = [
            ("dense", "dense softmax (the base model)", "", evaluation["dense"]),
            ("full", "full entmax", "", evaluation["full"]),
        ]
    for point in evaluation["points"]:
        for name, values in point["results"].items():
            shown = values["sparsity"] if point["sparsity"] is None else point["sparsity"]
            rows.append((name, LOOKS.by_name[name].label, f"{shown:.2f}{'*' if point['own'] else ''}", values))
    return rows


def _native(evaluation: dict[str, Any]) -> bool:
    """Tell whether the base model was trained with entmax, so that there is no dense model to compare with."""
    return evaluation["adapter"].get("entmax_native") is not None


def _verdict(evaluation: dict[str, Any]) -> str:
    """Say in one sentence what the predicted graph is worth at the adapter's own settings; nothing if not measured."""
    metric = metric_of(evaluation)
    if not any("heads" in point for point in evaluation["points"]):
        return ""
    point = covered_point(evaluation)
    results = point["results"]
    predicted, full = (metric.show(values[metric.key]) for values in (results["predicted"], evaluation["full"]))
    sentence = (
        f"With {100 * results['predicted']['sparsity']:.0f} % of the pairs left out it has a {metric.name} of "
        f"{predicted}, full entmax {full}"
    )
    if not _native(evaluation):
        sentence += f", dense softmax {metric.show(evaluation['dense'][metric.key])}"
    others = {name: values[metric.key] for name, values in results.items() if name not in ("predicted", "oracle")}
    if others:
        best = metric.best_of(others)
        sentence += (
            f"; of the other patterns the best is “{LOOKS.by_name[best].label}” with {metric.show(others[best])}"
        )
    return sentence + "."
