"""Draw how much of its own weights each head's predicted graph holds: the `heads` of a Sparsefinder evaluation."""

from pathlib import Path
from typing import Any

from hf_sparse.figures.style import SCALE, canvas, on_scale, reading


def covered_figure(evaluation: dict[str, Any], path: str | Path) -> None:
    """Draw mass recall and gold sparsity of every layer and query head.

    Args:
        evaluation: content of eval.json with a predicted graph.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("eval.json"):
        point = covered_point(evaluation)
        grids = {
            f"Mass recall of the predicted graph, {point['results']['predicted']['sparsity']:.2f} left out": point[
                "heads"
            ]["mass_recall"],
            "Share of pairs without weight in full entmax": evaluation["gold_heads"],
        }
        layers, across = list(evaluation["layers"]), len(evaluation["gold_heads"][0])
        down = len(layers)
    with canvas(path, 8.0, max(2.4, 1.2 + 0.2 * down)) as figure, reading("eval.json"):
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (title, grid) in zip(panels, grids.items(), strict=True):
            image = axes.imshow(grid, cmap=SCALE, vmin=0, vmax=1, aspect="auto")
            if down * across <= 144:
                for y, row in enumerate(grid):
                    for x, value in enumerate(row):
                        colour = on_scale(value)[1]
                        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("query head")
            axes.set_xticks(range(0, across, max(1, across // 8)))
            axes.set_yticks(range(0, down, max(1, down // 12)), layers[:: max(1, down // 12)])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("layer")
        figure.colorbar(image, ax=panels, label="share (1 is all)")


def covered_point(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the point of the adapter's own settings, or the first with a predicted graph.

    Raises:
        KeyError, TypeError, IndexError: there is none, or the content is not what hf-sparse writes.
    """
    with_heads = [point for point in evaluation["points"] if "heads" in point]
    return next((point for point in with_heads if point["own"]), None) or with_heads[0]
