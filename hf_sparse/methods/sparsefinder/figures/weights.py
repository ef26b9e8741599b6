"""Draw the weights of single heads, with the tokens written beside them: the `weights` of graphs.json."""

import math
from pathlib import Path
from typing import Any

from hf_sparse.figures.style import SCALE, canvas, reading

_ACROSS = 2
_LONGEST = 12  # characters of a token that is written out
_FAINTEST = 0.15  # place on the scale of the smallest weight, which must not look like none


def weights_figure(content: dict[str, Any], path: str | Path) -> None:
    """Draw, for some heads and a short text, the weight of each key for each query; what is white has a weight of 0.

    Args:
        content: content of graphs.json with `weights`.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("graphs.json"):
        heads, tokens = list(content["weights"]["heads"]), [_label(token) for token in content["weights"]["tokens"]]
        if not heads or not tokens:
            raise ValueError(f"expected weights of at least one head and token, got {len(heads)} and {len(tokens)}")
    across = min(_ACROSS, len(heads))
    down = math.ceil(len(heads) / across)
    with canvas(path, 3.9 * across + 0.2, 3.9 * down + 0.7) as figure, reading("graphs.json"):
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, PowerNorm

        scale = ListedColormap([colormaps[SCALE](_FAINTEST + (1 - _FAINTEST) * step / 255) for step in range(256)])
        panels = figure.subplots(down, across, squeeze=False)
        for axes in panels.flat[len(heads) :]:
            axes.set_visible(False)
        for axes, head in zip(panels.flat, heads, strict=False):
            # A square root: most weights are small, and it matters whether they are 0.
            norm = PowerNorm(0.5, 0, 1)
            image = axes.imshow(_image(head["weights"], len(tokens)), cmap=scale, norm=norm, interpolation="nearest")
            axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=5.5)
            axes.set_yticks(range(len(tokens)), tokens, fontsize=5.5)
            axes.tick_params(length=0, pad=1)
            axes.set_title(f"layer {head['layer']}, head {head['head']}", fontsize=8.5)
        bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.5, aspect=40, pad=0.02)
        bar.set_label("weight of the key (across) for the query (down); white is exactly 0", fontsize=8.5)
        figure.suptitle(f"Weights of the first {len(tokens)} tokens", x=0.02, ha="left", fontsize=10)


def _image(rows: list[list[tuple[int, float]]], length: int) -> Any:
    """Return weights as `[T, T]`, not a number where they are 0, which is drawn white."""
    import numpy as np

    image = np.full((length, length), np.nan)
    for query, weights in enumerate(rows):
        for key, weight in weights:
            image[query, key] = weight
    return image


def _label(token: str) -> str:
    """Return a token as one short line that is not blank."""
    word = token.strip() or repr(token)[1:-1]
    return word if len(word) <= _LONGEST else f"{word[: _LONGEST - 1]}…"
