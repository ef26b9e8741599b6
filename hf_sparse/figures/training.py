"""Draw the loss of a training."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse.figures.style import BLUE, canvas, reading

Points = list[tuple[int, float]]

#: Title and unit of the loss of each stage that every method can be trained in.
_STAGES = {
    "distill": ("Self-distillation", "KL from dense (nats per token)"),
    "lm": ("Language modelling", "cross-entropy (nats per token)"),
    "lora": ("LoRA, attention of inference", "loss"),
}
_MIXED = "KL from dense and what was added"  # unit of `distill` with `lm_weight` or `hidden_weight`
_DISTILLED_STATES = "1 - cosine to dense, tokens + texts"  # unit of `distill` for a model that predicts no tokens


def training_figure(
    training: dict[str, Any],
    path: str | Path,
    *,
    states: bool = False,
    stages: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Draw the loss of every stage of a training.

    Args:
        training: content of finetune.json, with at least one step.
        path: the PNG to write.
        states: the model predicts no tokens, so that self-distillation compares hidden states.
        stages: title and unit of the loss of the stages that only the method has.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    losses = losses_of(training)
    with canvas(path, 3.4 * len(losses) if len(losses) > 1 else 5.4, 3.2) as figure:
        draw_training(figure.subplots(1, len(losses), squeeze=False)[0], training, states, stages)


def losses_of(training: dict[str, Any] | None) -> dict[str, Points]:
    """Return (step, loss) of each stage of a training, in order.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    losses: dict[str, Points] = {}
    with reading("finetune.json"):
        for row in [] if training is None else training["history"]:
            losses.setdefault(row["stage"], []).append((int(row["step"]), float(row["loss"])))
    return losses


def draw_training(
    panels: Any,
    training: dict[str, Any] | None,
    states: bool,
    stages: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Draw each stage in a panel of its own, because each minimises something else.

    Args:
        panels: one for each stage.
        training: content of finetune.json, or `None` for no stage.
        states, stages: see `training_figure`.
    """
    known = {**_STAGES, **(stages or {})}
    settings = (training or {}).get("settings", {})
    if states:
        known["distill"] = (known["distill"][0], _DISTILLED_STATES)
    elif settings.get("lm_weight") or settings.get("hidden_weight"):
        known["distill"] = (known["distill"][0], _MIXED)
    for panel, (stage, points) in zip(panels, losses_of(training).items(), strict=True):
        _draw(panel, *known.get(stage, (stage, "loss")), points)


def _draw(axes: Any, title: str, unit: str, points: Points) -> None:
    """Draw losses, and their running mean."""
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
    """Return the centred running mean over about a tenth of the points; over fewer at the ends."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]
