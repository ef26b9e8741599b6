"""A line per selection: the chart behind the pictures over budgets and positions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_sparse.figures.style import DENSE, INK, look, ordered

_WIDE = 3.0  # from this ratio of the largest value to the smallest on, a linear axis would hide what is close to dense


def draw_lines(
    axes: Any,
    places: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    markers: bool = True,
) -> None:
    """Draw the values of each selection over the same places; `None` is a place where it was not measured.

    Raises:
        ValueError: a value that is not finite.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    found = [value for values in series.values() for value in values if value is not None]
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"values must be finite numbers, got {dict(series)}")
    if "dense" in series:
        axes.plot(places, series["dense"], color=INK, linewidth=1.3, linestyle=(0, (4, 3)), label=DENSE, zorder=2)
    for name in reversed(ordered(series)):  # the learned score on top of the others
        style, learned = look(name), name == "learned"
        values = [math.nan if value is None else value for value in series[name]]
        axes.plot(
            places,
            values,
            color=style.colour,
            marker=style.marker if markers else None,
            markersize=6.5 if name == "oracle" else 5,
            linewidth=2.4 if learned else 1.3,
            linestyle=":" if name == "oracle" else "-",
            label=style.label,
            zorder=4 if learned else 3,
        )
    low, high = min(found), max(found)
    if low > 0 and high / low > _WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")


def legend(figure: Any, axes: Any) -> None:
    """One legend below all panels, in the order of tables."""
    handles, labels = axes.get_legend_handles_labels()
    if labels and labels[0] == DENSE:
        handles, labels = [*handles[:0:-1], handles[0]], [*labels[:0:-1], labels[0]]
    else:
        handles, labels = handles[::-1], labels[::-1]
    figure.legend(handles, labels, loc="outside lower left", ncols=3, handlelength=2.6, fontsize=8.5)
