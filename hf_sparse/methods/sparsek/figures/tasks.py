"""Draw scores of a task: heat maps over the length of a text and the depth of a needle, or dots."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse.figures.dots import draw_dots, height
from hf_sparse.figures.style import SCALE, canvas, on_scale, reading
from hf_sparse.methods.sparsek.figures.looks import LOOKS

_PANELS = 3  # per row

Grid = list[list[float]]


def task_figure(name: str, task: dict[str, Any], path: str | Path) -> None:
    """Draw the results of a task: an entry of `tasks` of eval.json.

    Args:
        name: name of the task.
        task: `metric`, `settings` and `results`. The result of a selection is a number; or `lengths` and as many
            `values`, which become a row of one heat map; or `depths` too, and for each depth a list of `values`, which
            become a heat map of their own.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("eval.json"):
        metric, results = str(task["metric"]).replace("_", " "), dict(task["results"])
        title = f"{name.replace('_', ' ').capitalize()}: {metric}"
        if (slots := task["settings"].get("slots")) and not name.endswith(" slots"):  # otherwise the name says it
            title += f" with {slots} KV slots"
        title = title.encode("utf-8", "replace").decode()  # JSON can hold halves of characters
        names = [*(["dense"] if "dense" in results else []), *LOOKS.ordered(results)]
        if not names:
            raise ValueError(f"expected results of the task {name}, got none")
        first = results[names[0]]
        if isinstance(first, Mapping):
            columns = [f"{length:,}" for length in first["lengths"]]
            if "depths" in first:
                rows = [f"{depth:.0%}" for depth in first["depths"]]
                grids = {LOOKS.label(selection): results[selection]["values"] for selection in names}
            else:
                rows = [LOOKS.label(selection) for selection in names]
                grids = {"": [results[selection]["values"] for selection in names]}
    if not isinstance(first, Mapping):
        _dots(title, metric, results, path)
    else:
        with reading("eval.json"):
            _heat_maps(title, metric, rows, columns, grids, path)


def _dots(title: str, metric: str, results: dict[str, float], path: str | Path) -> None:
    """Draw a dot for each contender."""
    with reading("eval.json"):
        high = height(results)
    with canvas(path, 6.6, high) as figure, reading("eval.json"):
        axes = figure.subplots()
        draw_dots(axes, results, lambda value: f"{value:.3g}", LOOKS)
        axes.set_xlim(left=0)
        if max(results.values()) <= 1:
            axes.set_xticks([step / 5 for step in range(6)])
        axes.set_title(title)
        axes.set_xlabel(f"{metric}, higher is better")


def _heat_maps(
    title: str, metric: str, rows: list[str], columns: list[str], grids: dict[str, Grid], path: str | Path
) -> None:
    """Draw a panel for each grid, whose lines are `rows`."""
    for grid in grids.values():
        scores = [float(value) for line in grid for value in line]
        if {len(line) for line in grid} != {len(columns)} or len(grid) != len(rows):
            raise ValueError(f"expected {len(rows)} x {len(columns)} values, got {grid}")
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"{metric} must be finite, got {scores}")
    across = min(_PANELS, len(grids))
    down = math.ceil(len(grids) / across)
    labels = 0.065 * max(map(len, rows))
    width, high = max(2.0, 0.3 + 0.5 * len(columns)), 0.7 + 0.26 * len(rows)
    top = max(1.0, *(value for grid in grids.values() for line in grid for value in line))
    with canvas(path, max(4.2, across * width + labels + 1.4), max(2.9, down * high + 0.9)) as figure:
        panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(grids) :]:
            axes.set_visible(False)
        for axes, (name, grid) in zip(panels.flat, grids.items(), strict=False):
            image = axes.imshow(grid, cmap=SCALE, vmin=0, vmax=top, aspect="auto")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    axes.text(
                        x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=on_scale(value / top)[1]
                    )
            axes.set_title(name, fontsize=8.5)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        for axes in panels.flat[max(0, len(grids) - across) : len(grids)]:  # panels with no panel below
            axes.tick_params(labelbottom=True)
        figure.suptitle(title, x=0.02, ha="left", fontsize=10)
        figure.supxlabel("length of the prompt, tokens", fontsize=9)
        if len(grids) > 1 or "" not in grids:
            figure.supylabel("depth in the prompt", fontsize=9)
        figure.colorbar(image, ax=panels, label=f"{metric} (1 is best)" if top == 1 else metric, shrink=0.9)
