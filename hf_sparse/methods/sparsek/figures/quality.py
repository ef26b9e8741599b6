"""Draw what equal numbers of slots are worth, and how the scorers got there."""

from pathlib import Path
from typing import Any

from hf_sparse.figures.dots import draw_dots, height
from hf_sparse.figures.style import canvas, reading, sample
from hf_sparse.figures.training import draw_training, losses_of
from hf_sparse.methods.sparsek.figures.looks import LOOKS, STAGES, budget_unit
from hf_sparse.metrics import metric_of


def quality_figure(evaluation: dict[str, Any], training: dict[str, Any] | None, path: str | Path) -> None:
    """Draw quality at equal slots and, if there was a training, its loss.

    Args:
        evaluation: content of eval.json.
        training: content of finetune.json or `None`.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    losses = losses_of(training)
    with reading("eval.json"):
        metric = metric_of(evaluation)
        values = evaluation[metric.key]
        high = height(values)
    widths = [5.4] + [2.6 if len(losses) > 1 else 4.0] * len(losses)
    with canvas(path, sum(widths), high) as figure:
        axes, *panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        with reading("eval.json"):
            draw_dots(axes, values, metric.show, LOOKS, relative=metric.relative, best=metric.best)
            unit = budget_unit(evaluation)
            kept = f"{unit}, by the keys they hold" if unit == "KV slots" else unit
            axes.set_title(f"{metric.name.capitalize()} with {evaluation['budget']['slots']} {kept}")
            axes.set_xlabel(f"{metric.unit} ({sample(evaluation)})")
        draw_training(panels, losses, metric.key == "embedding_similarity", STAGES)


def divergence_figure(evaluation: dict[str, Any], path: str | Path) -> None:
    """Draw how far each selection's predictions are from the dense model's: `divergence` of eval.json.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("eval.json"):
        values = {"dense": 0.0, **evaluation["divergence"]}
        high = height(values)
    with canvas(path, 6.6, high) as figure, reading("eval.json"):
        axes = figure.subplots()
        draw_dots(axes, values, lambda value: f"{value:.3g}", LOOKS)
        axes.set_title(f"Divergence from dense with {evaluation['budget']['slots']} {budget_unit(evaluation)}")
        axes.set_xlabel(f"mean KL divergence, nats per token, lower is better ({sample(evaluation)})")
