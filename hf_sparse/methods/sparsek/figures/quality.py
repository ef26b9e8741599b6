"""Draw what equal numbers of slots are worth, and how the scorers got there."""

from pathlib import Path
from typing import Any

from hf_sparse.figures.contenders import contenders_figure
from hf_sparse.figures.dots import draw_dots, height
from hf_sparse.figures.style import canvas, reading, sample
from hf_sparse.methods.sparsek.figures.looks import LOOKS, STAGES, budget_unit


def quality_figure(evaluation: dict[str, Any], training: dict[str, Any] | None, path: str | Path) -> None:
    """Draw quality at equal slots and, if there was a training, its loss.

    Args:
        evaluation: content of eval.json.
        training: content of finetune.json or `None`.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("eval.json"):
        unit = budget_unit(evaluation)
        kept = f"{unit}, by the keys they hold" if unit == "KV slots" else unit
        conditions = f" with {evaluation['budget']['slots']} {kept}"
    contenders_figure(evaluation, training, path, LOOKS, conditions=conditions, stages=STAGES)


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
