"""Draw what contenders are worth beside dense attention, and the loss of the training behind them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse.figures.dots import draw_dots, height
from hf_sparse.figures.style import Looks, canvas, reading, sample
from hf_sparse.figures.training import draw_training, losses_of
from hf_sparse.metrics import metric_of


def contenders_figure(
    evaluation: dict[str, Any],
    training: dict[str, Any] | None,
    path: str | Path,
    looks: Looks,
    *,
    conditions: str = "",
    stages: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Draw the quality of every contender and, if there was a training, its loss.

    Args:
        evaluation: content of eval.json.
        training: content of finetune.json or `None`.
        path: the PNG to write.
        looks: of the contenders.
        conditions: follows the name of the metric in the title, such as `" with 256 KV slots"`.
        stages: title and unit of the loss of the stages that only the method has.

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
            draw_dots(axes, values, metric.show, looks, relative=metric.relative, best=metric.best)
            axes.set_title(f"{metric.name.capitalize()}{conditions}")
            axes.set_xlabel(f"{metric.unit} ({sample(evaluation)})")
        draw_training(panels, training, metric.key == "embedding_similarity", stages)
