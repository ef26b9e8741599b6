"""Draw which tokens stay: for each head over positions, and in a text."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_sparse.figures.style import INK, SCALE, canvas, on_scale, reading

_COLUMNS = 100  # characters of a line of a printed text
_HEAD, _TAIL = 8, 52  # lines of the page where the text has more: how it begins, and what the last query is near
_ADVANCE, _HEIGHT = 0.0715, 0.142  # inches per character and line at the size below
_SIZE = 8.55  # of which a character of DejaVu Sans Mono is `_ADVANCE` wide


def shade(kept: int, heads: int) -> tuple[str, str]:
    """Return background and ink, `#rrggbb`, of a token that `kept` of all `heads` keep.

    The scale is a square root: most tokens are kept by few heads, and it matters whether by one or by none.
    """
    return on_scale(0.95 * math.sqrt(kept / heads)) if kept else ("#ffffff", INK)


def heads_figure(selection: dict[str, Any], path: str | Path) -> None:
    """Draw the share of keys that each head keeps along the text.

    Args:
        selection: content of selection.json.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    with reading("selection.json"):
        rows, edges, text = selection["heads"], selection["edges"], selection["text"]
        layers: dict[int, int] = {}
        for row in rows:
            layers[row["layer"]] = layers.get(row["layer"], 0) + 1
        grid = [[float(value) for value in row["kept"]] for row in rows]
        causal, slots = selection["causal"], selection["budget"]["slots"]
    with canvas(path, 7.2, min(9.6, max(2.8, 1.3 + 0.115 * len(rows)))) as figure, reading("selection.json"):
        axes = figure.subplots()
        # A square root here too: outside sinks and window a few per cent are kept, inside all.
        image = axes.pcolormesh(edges, range(len(rows) + 1), grid, cmap=SCALE, norm=PowerNorm(0.5, 0, 1))
        starts, ticks = 0, []
        for layer, count in layers.items():
            ticks.append((starts + count / 2, f"{layer}"))
            starts += count
            if starts < len(rows):
                axes.axhline(starts, color="#777777", linewidth=0.5)
        ticks = ticks[:: math.ceil(len(ticks) / 32)]
        axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
        axes.set_ylim(len(rows), 0)
        axes.tick_params(axis="y", length=0)
        kind = "KV heads" if causal else "heads"
        when = f"after the text, in {slots} KV slots" if causal else "for every query, its window aside"
        axes.set_title(f"Keys that each head keeps {when}")
        axes.set_xlabel(f"position in the text, tokens (mean of {text['chunks']} × {text['length']} tokens)")
        axes.set_ylabel(f"layer (rows: {kind})")
        bar = figure.colorbar(image, ax=axes, label="keys kept", ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.ax.minorticks_off()


def tokens_figure(selection: dict[str, Any], path: str | Path) -> None:
    """Draw a text, of a long one the beginning and the end: each token on a colour that says how many heads keep it.

    Args:
        selection: content of selection.json.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    from matplotlib.patches import Rectangle

    with reading("selection.json"):
        pieces, total = [(str(piece), int(kept)) for piece, kept in selection["tokens"]], len(selection["heads"])
        cells = list(_cells(pieces))
        lines = 1 + cells[-1][0]
        gap = max(0, lines - _HEAD - _TAIL)
        if gap:
            cells = [cell for cell in cells if cell[0] < _HEAD or cell[0] >= _HEAD + gap]
            lines = _HEAD + _TAIL + 1
    high, top = lines * _HEIGHT, 0.75
    width = _COLUMNS * _ADVANCE
    margin = 0.12
    with canvas(path, width + 2 * margin, high + top + margin) as figure, reading("selection.json"):
        figure.set_layout_engine("none")
        whole = (margin / figure.get_figwidth(), 0, width / figure.get_figwidth(), 1)
        axes = figure.add_axes(whole)
        axes.set_xlim(0, _COLUMNS)
        axes.set_ylim((high + margin) / _HEIGHT, -top / _HEIGHT)
        axes.axis("off")
        known = _glyphs()
        kind = "KV heads" if selection["causal"] else "heads"
        axes.text(0, -4.2, f"How many of {total} {kind} keep each token", fontsize=10, va="center")
        for number, kept in enumerate(legend_of(total)):
            back, ink = shade(kept, total)
            place = (7 * number, -2.7)
            axes.add_patch(Rectangle(place, 6.6, 1.3, facecolor=back, edgecolor="#999999", linewidth=0.5))
            axes.text(place[0] + 3.3, -2.05, str(kept), color=ink, ha="center", va="center", fontsize=8)
        if gap:
            note = f"⋮   {gap:,} lines are left out here"
            axes.text(0, _HEAD + 0.54, note, color="#555555", fontsize=8, va="center_baseline")
        for line, column, characters, token in cells:
            line -= gap - 1 if gap and line >= _HEAD else 0
            back, ink = shade(pieces[token][1], total)
            if pieces[token][1]:
                axes.add_patch(Rectangle((column, line), len(characters), 1, facecolor=back, linewidth=0))
            shown = "".join(character if ord(character) in known else "▯" for character in characters)
            axes.text(
                column,
                line + 0.54,
                shown.replace("↵", " ") if not pieces[token][1] else shown,
                family="DejaVu Sans Mono",
                fontsize=_SIZE,
                color=ink,
                va="center_baseline",
                parse_math=False,
            )


def legend_of(total: int) -> list[int]:
    """Return the numbers of heads whose colours a legend shows: none, all, and up to seven between."""
    between = {round(total * (step / 8) ** 2) for step in range(1, 8)}
    return sorted({0, 1, total} | between)


def _cells(pieces: list[tuple[str, int]]) -> Iterator[tuple[int, int, str, int]]:
    """Yield line, column, characters and token of a text on lines of equal length; a line break is shown as `↵`."""
    line = column = 0
    for token, (piece, _) in enumerate(pieces):
        for part in piece.replace("\r", "").expandtabs(4).replace("\n", "↵\n").splitlines(keepends=True):
            rest = part.rstrip("\n")
            while rest:
                if column == _COLUMNS:
                    line, column = line + 1, 0
                taken, rest = rest[: _COLUMNS - column], rest[_COLUMNS - column :]
                yield line, column, taken, token
                column += len(taken)
            if part.endswith("\n"):
                line, column = line + 1, 0


def _glyphs() -> set[int]:
    """Return the characters that the font of the text has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return set(get_font(findfont(FontProperties(family="DejaVu Sans Mono"))).get_charmap())
