"""The report of a Sparsefinder adapter."""

from collections.abc import Sequence
from typing import Any

from hf_sparse.card import graph_rows
from hf_sparse.figures import covered_figure, graphs_figure, pareto_figure, training_figure
from hf_sparse.figures.covered import covered_point
from hf_sparse.figures.style import PATTERN_LOOKS, reading
from hf_sparse.metrics import metric_of
from hf_sparse.repo import EVALUATION, TRAINING
from hf_sparse.report_page import Picture, Pictures, render_page

GRAPHS = "graphs.json"


def draw_graphs(
    pictures: Pictures, evaluation: dict[str, Any], training: dict[str, Any] | None, graphs: dict[str, Any] | None
) -> None:
    """Draw all pictures for which there are measurements.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading(EVALUATION):
        states = metric_of(evaluation).key == "embedding_similarity"
        predicted = any("heads" in point for point in evaluation["points"])
    pictures.add("pareto", "sparsity of every graph against recall and quality", pareto_figure, evaluation)
    if predicted:
        pictures.add("covered", "mass recall and gold sparsity of every head", covered_figure, evaluation)
    if graphs is not None:
        pictures.add("graphs", "predicted and gold graphs of single heads", graphs_figure, graphs)
    if training is not None and training.get("history"):
        pictures.add("training", "loss at every optimiser step", training_figure, training, states=states)


def render_graphs(
    name: str,
    base_model: str | None,
    evaluation: dict[str, Any],
    training: dict[str, Any] | None,
    graphs: dict[str, Any] | None,
    drawn: Sequence[Picture],
) -> str:
    """The page.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    sources = f"{EVALUATION}, {TRAINING} or {GRAPHS}"
    with reading(sources):
        content = {"metric": metric_of(evaluation), "rows": graph_rows(evaluation), "verdict": _verdict(evaluation)}
    return render_page(
        "report_sparsefinder.html.jinja",
        sources,
        name=name,
        base_model=base_model,
        evaluation=evaluation,
        training=training,
        graphs=graphs,
        pictures={picture.name: picture for picture in drawn},
        **content,
    )


def _verdict(evaluation: dict[str, Any]) -> str:
    """One sentence on what the predicted graph is worth at the adapter's own settings; empty if it was not measured."""
    metric = metric_of(evaluation)
    if not any("heads" in point for point in evaluation["points"]):
        return ""
    point = covered_point(evaluation)
    results = point["results"]
    found, full = (metric.show(values[metric.key]) for values in (results["predicted"], evaluation["full"]))
    said = (
        f"With {100 * results['predicted']['sparsity']:.0f} % of the pairs left out it has a {metric.name} of {found}, "
        f"full entmax {full}, dense softmax {metric.show(evaluation['dense'][metric.key])}"
    )
    others = {name: values[metric.key] for name, values in results.items() if name not in ("predicted", "oracle")}
    if others:
        best = (min if metric.best is None else max)(others, key=lambda name: others[name])
        said += f"; of the other patterns the best is “{PATTERN_LOOKS[best].label}” with {metric.show(others[best])}"
    return said + "."
