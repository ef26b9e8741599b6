"""Hold what all pictures share: colours, looks of contenders, type, and the writing of a file."""

import os
from collections.abc import Iterable, Iterator, Mapping
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
    """Hold the label, the colour and the marker of a contender; the marker tells it apart without the colour."""

    label: str
    colour: str
    marker: str


@dataclass(frozen=True)
class Looks:
    """Hold the looks of the contenders that a method is compared with.

    Attributes:
        by_name: looks by the name of the contender, in the order in which charts and tables show them.
        learned: name of the contender that the method learns, which stands out.
        oracle: name of the contender that sees the future, which no method can be; drawn dotted.
        dense: label of dense attention, whose name is `"dense"`: the line that the others are compared with.
    """

    by_name: Mapping[str, Look]
    learned: str
    oracle: str = "oracle"
    dense: str = "dense (all keys)"

    def of(self, name: str) -> Look:
        """Return the look of a contender; one that has none of its own is grey and keeps its name."""
        return self.by_name.get(name) or Look(name.replace("_", " "), GREY, "h")

    def label(self, name: str) -> str:
        """Return the label of a contender or of `"dense"`."""
        return self.dense if name == "dense" else self.of(name).label

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return the names but `"dense"` in the order of `by_name`, then those that have no look of their own."""
        others = [name for name in names if name != "dense"]
        known = [name for name in self.by_name if name in others]
        return known + [name for name in others if name not in self.by_name]


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


def on_scale(level: float) -> tuple[str, str]:
    """Return a colour of `SCALE` at 0 to 1 and the ink that is readable on it, `#rrggbb`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colour = colormaps[SCALE](level)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return to_hex(colour), "#ffffff" if luminance < 0.18 else "#000000"  # the greater contrast, at least 4.5 (WCAG)


@contextmanager
def canvas(path: str | Path, width: float, height: float) -> Iterator["Figure"]:
    """Give a figure in our style, `width` x `height` inches, that becomes the PNG `path` whole or not at all.

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
    """Say on how many tokens a number was measured: `24 × 2048 tokens`."""
    return f"{evaluation['text']['chunks']} × {evaluation['text']['length']} tokens"
