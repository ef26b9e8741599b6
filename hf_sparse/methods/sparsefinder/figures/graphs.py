"""Draw predicted graphs beside the gold graph, head by head: the content of graphs.json."""

import math
from pathlib import Path
from typing import Any

from hf_sparse.figures.style import INK, canvas, reading

_ACROSS = 3
_PREDICTED = "#bcd7ea"  # light enough to draw on
_MISSED = "#d55e00"


def graphs_figure(content: dict[str, Any], path: str | Path) -> None:
    """Draw, for some heads, the predicted pairs as areas and on them the pairs with a weight in full entmax.

    Args:
        content: content of graphs.json.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("graphs.json"):
        heads, length = list(content["heads"]), int(content["length"])
        if not heads:
            raise ValueError("expected the graphs of at least one head, got none")
    across = min(_ACROSS, len(heads))
    down = math.ceil(len(heads) / across)
    with canvas(path, 2.75 * across + 0.5, 2.95 * down + 0.9) as figure, reading("graphs.json"):
        from matplotlib.patches import Patch

        panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(heads) :]:
            axes.set_visible(False)
        for axes, head in zip(panels.flat, heads, strict=False):
            image = _image(head, content["tile"], content.get("query_tile", content["tile"]), length)
            axes.imshow(image, interpolation="nearest", origin="upper")
            axes.set_title(
                f"layer {head['layer']}, head {head['head']}\nmass {head['mass_recall']:.2f}, "
                f"edges {head['recall']:.2f} held",
                fontsize=8.5,
            )
        for axes in panels.flat[max(0, len(heads) - across) : len(heads)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("position of the key, tokens")
        for axes in panels[:, 0]:
            axes.set_ylabel("position of the query, tokens")
        patches = [
            Patch(color=_PREDICTED, label="predicted"),
            Patch(color=INK, label="weight in full entmax, predicted"),
            Patch(color=_MISSED, label="weight in full entmax, missed"),
        ]
        figure.legend(handles=patches, loc="outside lower left", ncols=3, fontsize=8.5)
        figure.suptitle(f"Predicted and gold graphs of a text of {length} tokens", x=0.02, ha="left", fontsize=10)


def _image(head: dict[str, Any], tile: int, query_tile: int, length: int) -> Any:
    """Return `[T, T, 3]` colours from 0 to 1."""
    import numpy as np
    from matplotlib.colors import to_rgb

    predicted, gold = np.zeros((length, length), bool), np.zeros((length, length), bool)
    for row, keys in enumerate(head["predicted"]):
        for key in keys:
            predicted[row * query_tile : (row + 1) * query_tile, key * tile : (key + 1) * tile] = True
    for row, keys in enumerate(head["gold"]):
        gold[row, keys] = True
    if head["causal"]:
        predicted &= np.tri(length, dtype=bool)
    image = np.ones((length, length, 3))
    image[predicted] = to_rgb(_PREDICTED)
    image[gold & predicted] = to_rgb(INK)
    image[gold & ~predicted] = to_rgb(_MISSED)
    return image
