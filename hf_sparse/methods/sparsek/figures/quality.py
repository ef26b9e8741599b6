"""What equal numbers of slots are worth, and how the scorers got there."""

from pathlib import Path
from typing import Any

from hf_sparse.figures.dots import draw_dots, height
from hf_sparse.figures.style import canvas, places, reading, sample
from hf_sparse.figures.training import draw_training, stages_of
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
    stages = stages_of(training)
    with reading("eval.json"):
        metric = metric_of(evaluation)
        values = evaluation[metric.key]
        high = height(values)
    widths = [5.4] + [2.6 if len(stages) > 1 else 4.0] * len(stages)
    with canvas(path, sum(widths), high) as figure:
        axes, *panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        with reading("eval.json"):
            draw_dots(axes, values, metric.show, relative=metric.relative, best=metric.best)
            kind = places(evaluation)
            kept = f"{kind}, by the keys they hold" if kind == "KV slots" else kind
            axes.set_title(f"{metric.name.capitalize()} with {evaluation['budget']['slots']} {kept}")
            axes.set_xlabel(f"{metric.unit} ({sample(evaluation)})")
        draw_training(panels, stages, states=metric.key == "embedding_similarity")


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
        draw_dots(axes, values, lambda value: f"{value:.3g}")
        axes.set_title(f"Divergence from dense with {evaluation['budget']['slots']} {places(evaluation)}")
        axes.set_xlabel(f"mean KL divergence, nats per token, lower is better ({sample(evaluation)})")
