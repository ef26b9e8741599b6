"""Draw what a graph keeps at a sparsity, beside the graphs of others."""

import math
from pathlib import Path
from typing import Any

from hf_sparse.figures.lines import LOG_FROM
from hf_sparse.figures.style import GREY, INK, WIDTH, canvas, reading, sample
from hf_sparse.methods.sparsefinder.figures.looks import LOOKS
from hf_sparse.metrics import metric_of

_FULL = "full entmax (all keys)"
_GOLD = "share of pairs without weight in full entmax"

Curves = dict[str, list[tuple[float, float]]]


def pareto_figure(evaluation: dict[str, Any], path: str | Path) -> None:
    """Draw the sparsity of every graph against its mass recall, its edge recall and the model's metric.

    Args:
        evaluation: content of the eval.json of a Sparsefinder adapter.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("eval.json"):
        metric = metric_of(evaluation)
        panels = [
            ("mass_recall", "Mass recall, higher is better", "share of the weights held"),
            ("recall", "Edge recall, higher is better", "share of pairs with a weight held"),
            (metric.key, metric.name.capitalize(), metric.unit),
        ]
        curves = {key: curves_of(evaluation, key) for key, _, _ in panels}
        references = {_FULL: (float(evaluation["full"][metric.key]), (0, (4, 3)))}
        if evaluation["adapter"].get("entmax_native") is None:
            references[LOOKS.dense] = float(evaluation["dense"][metric.key]), (0, (1, 2))
        gold = float(evaluation["full"]["gold_sparsity"])
    with canvas(path, WIDTH, 6.6) as figure, reading("eval.json"):
        *grid, rest = figure.subplots(2, 2).flat
        for axes, (key, title, unit) in zip(grid, panels, strict=True):
            _draw(axes, curves[key], references if key == metric.key else {})
            axes.axvline(gold, color=GREY, linewidth=0.9, linestyle=(0, (6, 2, 1, 2)), label=_GOLD, zorder=1)
            if key != metric.key:
                axes.set_ylim(top=1.02)
            axes.set_title(title)
            axes.set_xlabel("share of the pairs left out")
            axes.set_ylabel(unit)
        handles, labels = grid[-1].get_legend_handles_labels()
        order = {look.label: place for place, look in enumerate(LOOKS.by_name.values())}
        shown = sorted(zip(labels, handles, strict=True), key=lambda pair: order.get(pair[0], len(order)))
        names, lines = [name for name, _ in shown], [line for _, line in shown]
        rest.set_axis_off()
        rest.legend(lines, names, loc="center left", handlelength=2.6, fontsize=9, labelspacing=0.7)
        figure.suptitle(f"Graphs of equal numbers of tiles ({sample(evaluation)})", x=0.02, ha="left", fontsize=10)


def curves_of(evaluation: dict[str, Any], key: str) -> Curves:
    """Return (sparsity, value) of each pattern, by sparsity.

    Raises:
        KeyError, TypeError, ValueError: the content is not what hf-sparse writes, or a value is not finite.
    """
    curves: Curves = {}
    for point in evaluation["points"]:
        for name, values in point["results"].items():
            pair = float(values["sparsity"]), float(values[key])
            if not all(map(math.isfinite, pair)):
                raise ValueError(f"values must be finite numbers, got {pair} for {name}")
            curves.setdefault(name, []).append(pair)
    if not curves:
        raise ValueError("expected at least one measured pattern, got none")
    return {name: sorted(pairs) for name, pairs in curves.items()}


def _draw(axes: Any, curves: Curves, references: dict[str, tuple[float, Any]]) -> None:
    """Draw the curve of each pattern, and reference values as lines; label, value and dashes of each."""
    for label, (value, dashes) in references.items():
        axes.axhline(value, color=INK, linewidth=1.2, linestyle=dashes, label=label, zorder=2)
    for name in reversed(LOOKS.ordered(curves)):
        style, learned = LOOKS.of(name), name == LOOKS.learned
        across, up = zip(*curves[name], strict=True)
        axes.plot(
            across,
            up,
            color=style.colour,
            marker=style.marker,
            markersize=6.5 if name == LOOKS.oracle or learned else 4.5,
            linewidth=2.4 if learned else 1.2,
            linestyle=":" if name == LOOKS.oracle else "-",
            label=style.label,
            zorder=4 if learned else 3,
        )
    values = [value for pairs in curves.values() for _, value in pairs] + [value for value, _ in references.values()]
    if references and min(values) > 0 and max(values) / min(values) > LOG_FROM:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")
