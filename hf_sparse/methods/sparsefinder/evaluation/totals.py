"""Add up the measurements of a model under one kind of attention, batch by batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hf_sparse.metrics import METRIC_KEYS
from hf_sparse.model_kinds import Kind


@dataclass
class Totals:
    """Hold the sum of every quantity over texts, and how many values each sum has."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in one value per prediction, or per text, of every quantity."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double().sum().item()
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def means(self, kind: Kind) -> dict[str, float]:
        """Return the metric of a kind of models by its key in eval.json, and the means of what else was measured."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        if kind == "features":
            return means
        perplexity = math.exp(means.pop("nats"))
        return {METRIC_KEYS[kind]: perplexity, **means}
