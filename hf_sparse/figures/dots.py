"""Draw a row per contender and a dot for its value: the chart behind several pictures."""

import math
from collections.abc import Callable, Mapping
from textwrap import fill
from typing import Any

from hf_sparse.figures.style import INK, Looks


def height(values: Mapping[str, Any]) -> float:
    """Return the inches that a chart of the values of these contenders needs."""
    return max(3.3, 1.7 + 0.4 * len(values.keys() - {"dense"}))


def draw_dots(
    axes: Any,
    values: Mapping[str, float],
    show: Callable[[float], str],
    looks: Looks,
    *,
    relative: bool = False,
    best: float | None = None,
) -> None:
    """Draw a dot for each contender; the stem from the dense line to the dot is what sparsity costs.

    Args:
        values: a number for each contender; `dense` becomes a line.
        show: writes a value as a label.
        looks: labels, colours and markers of the contenders.
        relative: tell the difference from dense in percent.
        best: the value that nothing exceeds, if there is one.

    Raises:
        ValueError: a value that is not finite.
    """
    values = {name: float(value) for name, value in values.items()}
    if not values or not all(map(math.isfinite, values.values())):
        raise ValueError(f"values must be finite numbers, got {values}")
    shown, dense = looks.ordered(values), values.get("dense")
    for row, name in enumerate(shown):
        colour, value = looks.of(name).colour, values[name]
        label, start = show(value), value
        if dense is not None:
            start = max(value, dense)
            label += f"  ({100 * (value / dense - 1):+.1f} %)" if relative else ""
            axes.plot([dense, value], [row, row], color=colour, linewidth=3, solid_capstyle="butt", zorder=2)
        axes.plot(value, row, "o", color=colour, markersize=9, zorder=3)
        weight = "bold" if name == looks.learned else "normal"
        axes.annotate(label, (start, row), (9, 0), textcoords="offset points", va="center", fontweight=weight)
    if dense is not None:
        axes.axvline(dense, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(f"{looks.dense} {show(dense)}", (dense, -0.62), (7, 0), textcoords="offset points", va="center")
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.02 * (high - low), high + 0.42 * (high - low))  # room for the labels
    if best is not None:
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= best])
    axes.set_ylim(len(shown) - 0.5, -0.95)
    axes.set_yticks(range(len(shown)), [fill(looks.label(name), 22) for name in shown])
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
