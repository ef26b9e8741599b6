"""Draw quality along a text: whether sparse attention gets worse as more keys have left."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_sparse.figures.lines import draw_legend, draw_lines
from hf_sparse.figures.style import GREY, WIDTH, canvas, reading, sample
from hf_sparse.methods.sparsek.figures.looks import LOOKS
from hf_sparse.metrics import metric_of


def positions_figure(evaluation: dict[str, Any], path: str | Path) -> None:
    """Draw the metric by position: `by_position` of eval.json, and against dense in a second panel.

    Args:
        evaluation: content of eval.json.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("eval.json"):
        metric = metric_of(evaluation)
        series = dict(evaluation["by_position"])
        edges = [float(edge) for edge in series.pop("edges")]
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        dense, slots = series.get("dense"), evaluation["budget"]["slots"]
        panels: list[tuple[str, str, dict[str, list[float]]]] = [
            (f"{metric.name.capitalize()} ({sample(evaluation)})", metric.unit, series)
        ]
        if dense is not None and len(series) > 1:
            others = {name: values for name, values in series.items() if name != "dense"}
            change = {
                name: [100 * (a / b - 1) for a, b in zip(values, dense, strict=True)] for name, values in others.items()
            }
            panels.append(("Against dense", f"{metric.name}, % above dense", change))
    with canvas(path, WIDTH if len(panels) > 1 else 5.6, 4.2) as figure, reading("eval.json"):
        row_of_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, unit, values) in zip(row_of_axes, panels, strict=True):
            draw_lines(axes, middles, values, LOOKS, markers=len(middles) <= 20)
            axes.axvline(slots, color=GREY, linewidth=0.8, zorder=1)
            axes.set_xlim(edges[0], edges[-1])
            axes.set_title(title)
            axes.set_xlabel(f"position in the text, tokens (line: {slots} slots full)")
            axes.set_ylabel(unit)
        draw_legend(figure, row_of_axes[0], LOOKS)
