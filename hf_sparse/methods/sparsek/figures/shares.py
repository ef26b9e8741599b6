"""Draw how many keys each KV head selects."""

from collections.abc import Sequence
from pathlib import Path

from hf_sparse.figures.style import SCALE, WIDTH, canvas, on_scale

_MOST_NUMBERS = 36  # layers beside one another whose cells have room for a number


def shares_figure(counts: Sequence[Sequence[int]], path: str | Path) -> None:
    """Draw the selected keys of every KV head, a column for each layer.

    Args:
        counts: for each attention layer, the selected keys of each of its heads.
        path: the PNG to write.
    """
    from matplotlib.colors import LogNorm

    layers, heads = len(counts), len(counts[0])
    most, least = max(map(max, counts)), min(map(min, counts))
    with canvas(path, WIDTH, min(9.6, 1.5 + 0.24 * heads)) as figure:
        axes = figure.subplots()
        norm = LogNorm(max(1, least) / 1.5, most)  # a head with twice as many is as far off everywhere
        image = axes.pcolormesh(list(zip(*counts, strict=True)), cmap=SCALE, norm=norm, edgecolors="white", linewidth=1)
        for layer, row in enumerate(counts if layers <= _MOST_NUMBERS else ()):
            for head, count in enumerate(row):
                _, ink = on_scale(float(norm(count)))
                axes.text(layer + 0.5, head + 0.5, str(count), color=ink, ha="center", va="center", fontsize=5.5)
        step = -(-layers // 40)
        axes.set_xticks([layer + 0.5 for layer in range(0, layers, step)], [f"{n}" for n in range(0, layers, step)])
        axes.set_yticks([head + 0.5 for head in range(heads)], [f"{head}" for head in range(heads)])
        axes.set_ylim(heads, 0)
        axes.tick_params(length=0, labelsize=7)
        axes.spines[:].set_visible(False)
        mean = sum(map(sum, counts)) / (layers * heads)
        axes.set_title(f"Keys that each KV head selects: {least:,} to {most:,}, {mean:,.0f} on average")
        axes.set_xlabel("layer")
        axes.set_ylabel("KV head")
        bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=[least, round(mean), most])
        bar.ax.set_yticklabels([f"{value:,}" for value in (least, round(mean), most)])
        bar.ax.minorticks_off()
