"""Define the measures of eval.json, and how people read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """Describe one measure of quality.

    Attributes:
        key: key of its values in eval.json, and the value of `metric` there.
        name: in a sentence.
        unit: the unit of a value, and which direction is better.
        digits: after the point.
        relative: whether a difference from dense attention is shown in percent.
        best: the value that nothing exceeds, if there is one.
    """

    key: str
    name: str
    unit: str
    digits: int
    relative: bool
    best: float | None = None

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def best_of(self, values: Mapping[str, float]) -> str:
        """Return the name of the best value."""
        return (min if self.best is None else max)(values, key=lambda name: values[name])


METRICS = {
    metric.key: metric
    for metric in (
        Metric("perplexity", "perplexity", "perplexity per token, lower is better", 2, True),
        Metric("masked_perplexity", "masked-token perplexity", "perplexity per masked token, lower is better", 2, True),
        Metric(
            "embedding_similarity",
            "embedding similarity",
            "cosine to the mean-pooled dense embedding, higher is better",
            digits=4,
            relative=False,
            best=1.0,
        ),
    )
}


#: The metric of each kind of models, see `hf_sparse.model_kinds.Kind`.
METRIC_KEYS = {"causal": "perplexity", "masked": "masked_perplexity", "features": "embedding_similarity"}


def metric_of(evaluation: Mapping[str, Any]) -> Metric:
    """Return the metric of an eval.json; files from before there were several have perplexities.

    Raises:
        KeyError: an unknown metric.
    """
    return METRICS[evaluation.get("metric", "perplexity")]
