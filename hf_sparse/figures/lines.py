"""Draw a line per contender: the chart behind pictures over budgets and positions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_sparse.figures.style import INK, Looks

# From this ratio of the largest value to the smallest on, a linear axis would hide what is close to dense.
LOG_FROM = 3.0


def draw_lines(
    axes: Any,
    places: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    looks: Looks,
    *,
    markers: bool = True,
) -> None:
    """Draw the values of each contender over the same places; `None` is a place where it was not measured.

    Raises:
        ValueError: a value that is not finite.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    numbers = [value for values in series.values() for value in values if value is not None]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"values must be finite numbers, got {dict(series)}")
    if "dense" in series:
        axes.plot(places, series["dense"], color=INK, linewidth=1.3, linestyle=(0, (4, 3)), label=looks.dense, zorder=2)
    for name in reversed(looks.ordered(series)):  # the learned contender last, on top of the others
        style, learned = looks.of(name), name == looks.learned
        values = [math.nan if value is None else value for value in series[name]]
        axes.plot(
            places,
            values,
            color=style.colour,
            marker=style.marker if markers else None,
            markersize=6.5 if name == looks.oracle else 5,
            linewidth=2.4 if learned else 1.3,
            linestyle=":" if name == looks.oracle else "-",
            label=style.label,
            zorder=4 if learned else 3,
        )
    low, high = min(numbers), max(numbers)
    if low > 0 and high / low > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")


def draw_legend(figure: Any, axes: Any, looks: Looks) -> None:
    """Draw one legend below all panels, in the order of tables."""
    handles, labels = axes.get_legend_handles_labels()
    if labels and labels[0] == looks.dense:
        handles, labels = [*handles[:0:-1], handles[0]], [*labels[:0:-1], labels[0]]
    else:
        handles, labels = handles[::-1], labels[::-1]
    figure.legend(handles, labels, loc="outside lower left", ncols=3, handlelength=2.6, fontsize=8.5)
