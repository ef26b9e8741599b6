"""The loss of a training."""

import math
from pathlib import Path
from typing import Any

from hf_sparse.figures.style import BLUE, canvas, reading

Stages = dict[str, list[tuple[int, float]]]

#: What each stage of a training minimises.
_STAGES = {
    "attention": ("Warm start", "squared error of scores"),
    "distill": ("Self-distillation", "KL from dense (nats per token)"),
    "lm": ("Language modelling", "cross-entropy (nats per token)"),
    "lora": ("LoRA, hard selection", "loss"),
    "graph": ("Projections", "loss of the predicted graph"),
}
_DISTILLED_STATES = "1 - cosine to dense, tokens + texts"  # what `distill` is for a model that predicts no tokens


def training_figure(training: dict[str, Any], path: str | Path, *, states: bool = False) -> None:
    """Draw the loss of every stage of a training.

    Args:
        training: content of finetune.json, with at least one step.
        path: the PNG to write.
        states: the model predicts no tokens, so that self-distillation compares hidden states.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    stages = stages_of(training)
    with canvas(path, 3.4 * len(stages) if len(stages) > 1 else 5.4, 3.2) as figure:
        draw_training(figure.subplots(1, len(stages), squeeze=False)[0], stages, states)


def stages_of(training: dict[str, Any] | None) -> Stages:
    """(step, loss) of each stage of a training, in order.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    stages: Stages = {}
    with reading("finetune.json"):
        for row in [] if training is None else training["history"]:
            stages.setdefault(row["stage"], []).append((int(row["step"]), float(row["loss"])))
    return stages


def draw_training(panels: Any, stages: Stages, states: bool) -> None:
    """A panel of its own for each stage, because each minimises something else."""
    for panel, (stage, points) in zip(panels, stages.items(), strict=True):
        title, unit = _STAGES.get(stage, (stage, "loss"))
        _draw(panel, title, _DISTILLED_STATES if states and stage == "distill" else unit, points)


def _draw(axes: Any, title: str, unit: str, points: list[tuple[int, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, losses = zip(*points, strict=True)
    few = len(points) < 20
    axes.plot(steps, losses, color=BLUE, linewidth=0.8, alpha=0.35, marker="o" if few else None, markersize=3)
    axes.plot(steps, _smooth(losses), color=BLUE, linewidth=2)
    axes.set_title(title)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Centred running mean over about a tenth of the points; shorter at the ends, so that nothing is made up."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]
