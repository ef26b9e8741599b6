"""What all pictures share: colours, the names of the selections, type, and how a file is written."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which every common kind of colour vision tells apart; in grey they differ in lightness.
INK, BLUE, ORANGE, GREY = "#222222", "#0072b2", "#e69f00", "#8a8a8a"

#: A sequential scale from white to dark blue: safe for every colour vision, and in grey still in order.
SCALE = "Blues"

#: Dots per inch of a file, and the most inches that a picture should be wide to be readable on a printed page.
DPI, WIDTH = 200, 8.0


@dataclass(frozen=True)
class Look:
    """How a selection appears: its name in words, a colour, and a marker that tells it apart without the colour."""

    label: str
    colour: str
    marker: str


#: Selections in the order in which charts and tables show them.
LOOKS = {
    "learned": Look("best by learned score", BLUE, "o"),
    "recency": Look("most recent (StreamingLLM)", ORANGE, "s"),
    "window": Look("nearest", ORANGE, "s"),
    "key_norm": Look("smallest key norm", "#009e73", "^"),
    "key_difference": Look("most unlike the mean key (KeyDiff)", "#56b4e9", "v"),
    "h2o": Look("accumulated attention (H2O)", "#d55e00", "D"),
    "tova": Look("last query's attention (TOVA)", "#cc79a7", "P"),
    "snapkv": Look("prompt's last queries (SnapKV)", "#a68a00", "X"),
    "random": Look("chosen at random", GREY, "d"),
    "oracle": Look("future attention (oracle)", "#000000", "*"),
}
DENSE = "dense (all keys)"

#: What graphs of entmax attention are called, in the order of the contenders of their method.
PATTERN_LOOKS = {
    "predicted": Look("predicted graph", BLUE, "o"),
    "longformer": Look("window and global (Longformer)", ORANGE, "s"),
    "windows": Look("windows of fitted widths", "#8c564b", "<"),
    "bigbird": Look("window, global, random (BigBird)", GREY, "d"),
    "strided": Look("strided (Sparse Transformer)", "#009e73", "^"),
    "fixed": Look("fixed (Sparse Transformer)", "#56b4e9", "v"),
    "lsh": Look("hashes (Reformer)", "#d55e00", "D"),
    "routing": Look("k-means (Routing Transformer)", "#cc79a7", "P"),
    "bound": Look("page bound", "#a68a00", "X"),
    "oracle": Look("most mass (oracle)", "#000000", "*"),
}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in the name of a task is one
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


def look(name: str) -> Look:
    """The look of a selection; one that has none of its own is grey and keeps its name."""
    return LOOKS.get(name) or Look(name.replace("_", " "), GREY, "h")


def on_scale(level: float) -> tuple[str, str]:
    """A colour of `SCALE` at 0 to 1 and the ink that is readable on it, `#rrggbb`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colour = colormaps[SCALE](level)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return to_hex(colour), "#ffffff" if luminance < 0.18 else "#000000"  # the greater contrast, at least 4.5 (WCAG)


def ordered(names: Iterable[str]) -> list[str]:
    """Selections but dense in the order of `LOOKS`, then the unknown ones."""
    found = [name for name in names if name != "dense"]
    return [*(name for name in LOOKS if name in found), *(name for name in found if name not in LOOKS)]


@contextmanager
def canvas(path: str | Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure in the house style, `width` x `height` inches, that becomes the PNG `path` whole or not at all.

    The caller's settings of matplotlib stay as they are.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        yield figure
        try:
            figure.savefig(partial, format="png")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what goes wrong with damaged content of a file `name` into a `DataError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} is not what hf-sparse writes: {error!r}") from error


def sample(evaluation: dict[str, Any]) -> str:
    """What a number was measured on: `24 × 2048 tokens`."""
    return f"{evaluation['text']['chunks']} × {evaluation['text']['length']} tokens"


def places(evaluation: dict[str, Any]) -> str:
    """What a budget counts: slots of a KV cache, or keys that a query of an encoder reads."""
    return "KV slots" if evaluation.get("metric", "perplexity") == "perplexity" else "keys per query"
