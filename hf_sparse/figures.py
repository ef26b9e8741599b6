"""The figure of an adapter: what equal numbers of slots are worth, and how the scorers got there."""

import math
import os
from pathlib import Path
from typing import Any

from hf_sparse.errors import DataError
from hf_sparse.metrics import metric_of

# Okabe and Ito's colours, which every common kind of colour vision tells apart; in grey they differ in lightness.
_INK, _BLUE, _ORANGE, _GREY = "#222222", "#0072b2", "#e69f00", "#8a8a8a"

#: Selections from the top of the chart to the bottom: label and colour.
_SELECTIONS = {
    "learned": ("best by\nlearned score", _BLUE),
    "recency": ("most\nrecent", _ORANGE),
    "window": ("nearest", _ORANGE),
    "random": ("chosen\nat random", _GREY),
}

#: What each stage of a training minimises.
_STAGES = {
    "attention": ("Warm start", "squared error of scores"),
    "distill": ("Self-distillation", "KL from dense (nats per token)"),
    "lm": ("Language modelling", "cross-entropy (nats per token)"),
}
_DISTILLED_STATES = "1 - cosine to dense, tokens + texts"  # what `distill` is for a model that predicts no tokens


def quality_figure(evaluation: dict[str, Any], training: dict[str, Any] | None, path: str | Path) -> None:
    """Draw quality at equal slots and, if there was a training, its loss; the PNG appears whole or not at all.

    Args:
        evaluation: content of eval.json.
        training: content of finetune.json or `None`.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    stages = _stages(training)
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7,
    }
    with rc_context(style):
        widths = [5.4] + [2.6 if len(stages) > 1 else 4.0] * len(stages)
        figure = Figure(figsize=(sum(widths), 3.3), dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        axes, *panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        try:
            _draw_quality(axes, evaluation)
            states = metric_of(evaluation).key == "embedding_similarity"
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"eval.json is not what hf-sparse writes: {error!r}") from error
        for panel, (stage, points) in zip(panels, stages.items(), strict=True):
            title, unit = _STAGES.get(stage, (stage, "loss"))
            _draw_training(panel, title, _DISTILLED_STATES if states and stage == "distill" else unit, points)
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            figure.savefig(partial, format="png")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _draw_quality(axes: Any, evaluation: dict[str, Any]) -> None:
    """A dot per selection; the stem from the dense line to the dot is what sparsity costs."""
    metric = metric_of(evaluation)
    values = {name: float(value) for name, value in evaluation[metric.key].items()}
    if not all(map(math.isfinite, values.values())):
        raise ValueError(f"{metric.name} must be finite, got {values}")
    shown = [name for name in _SELECTIONS if name in values]
    dense = values.get("dense")
    for row, name in enumerate(shown):
        colour, value = _SELECTIONS[name][1], values[name]
        label, start = metric.show(value), value
        if dense is not None:
            start = max(value, dense)
            label += f"  ({100 * (value / dense - 1):+.1f} %)" if metric.relative else ""
            axes.plot([dense, value], [row, row], color=colour, linewidth=3, solid_capstyle="butt", zorder=2)
        axes.plot(value, row, "o", color=colour, markersize=10, zorder=3)
        weight = "bold" if name == "learned" else "normal"
        axes.annotate(label, (start, row), (9, 0), textcoords="offset points", va="center", fontweight=weight)
    if dense is not None:
        axes.axvline(dense, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"dense (all keys) {metric.show(dense)}", (dense, -0.62), (7, 0), textcoords="offset points", va="center"
        )
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.02 * (high - low), high + 0.38 * (high - low))  # room for the labels
    if metric.best is not None:
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= metric.best])
    axes.set_ylim(len(shown) - 0.5, -0.95)
    axes.set_yticks(range(len(shown)), [_SELECTIONS[name][0] for name in shown])
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    text, slots = evaluation["text"], evaluation["budget"]["slots"]
    places = f"{slots} KV slots, by the keys they hold" if metric.key == "perplexity" else f"{slots} keys per query"
    axes.set_title(f"{metric.name.capitalize()} with {places}")
    axes.set_xlabel(f"{metric.unit} ({text['chunks']} × {text['length']} tokens)")


def _draw_training(axes: Any, title: str, unit: str, points: list[tuple[int, float]]) -> None:
    """A panel of its own for each stage, because each minimises something else."""
    from matplotlib.ticker import MaxNLocator

    steps, losses = zip(*points, strict=True)
    few = len(points) < 20
    axes.plot(steps, losses, color=_BLUE, linewidth=0.8, alpha=0.35, marker="o" if few else None, markersize=3)
    axes.plot(steps, _smooth(losses), color=_BLUE, linewidth=2)
    axes.set_title(title)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")


def _stages(training: dict[str, Any] | None) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of each stage of a training, in order."""
    stages: dict[str, list[tuple[int, float]]] = {}
    try:
        for row in [] if training is None else training["history"]:
            stages.setdefault(row["stage"], []).append((int(row["step"]), float(row["loss"])))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"finetune.json is not what hf-sparse writes: {error!r}") from error
    return stages


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Centred running mean over about a tenth of the points; shorter at the ends, so that nothing is made up."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]
