"""Define the training settings of Sparsefinder; without torch, for the command line makes options of the fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from hf_sparse.core.checks import is_finite
from hf_sparse.core.settings import TrainingSettings, check_choice, check_integer, check_number

#: Losses of the projections.
GraphLoss = Literal["profile_nce", "pair_hinge", "sum_hinge", "mass_hinge", "info_nce"]


@dataclass(frozen=True)
class SparsefinderTrainingSettings(TrainingSettings):
    """Hold what `FinetuneConfig` takes for Sparsefinder besides the settings of every method.

    Attributes:
        graph_steps: optimiser steps of `"graph"` after `"distill"` or `"lm"`. With 0 the projections stay as they are
            and nothing is fitted.
        graph_loss: the loss that trains the projections, on the entmax probabilities of the model itself.
            `"info_nce"`: cross entropy of the probabilities and a softmax of minus the distances; `"profile_nce"`: the
            same with the distance profile of the head in the softmax, as in the predictors; `"pair_hinge"`: the
            paper's; `"sum_hinge"`: that of its released code; `"mass_hinge"`: edges weighted by probability. See
            `hf_sparse.ops.predictors.losses`.
        graph_rows: queries per text and layer that `"graph"` looks at, drawn anew for each step; at least 1.
        graph_learning_rate: the peak of `"graph"`.
        alpha_start: alpha grows from this value, above 1, to its own over the steps of the objective; not where it is
            learned. None: no annealing.
    """

    objectives: ClassVar[Mapping[str, str]] = {"graph": "projections only."}

    graph_steps: int = field(default=100, metadata={"help": "Steps of `graph` after the others."})
    graph_loss: GraphLoss = field(default="profile_nce", metadata={"help": "Loss that trains the projections."})
    graph_rows: int = field(default=128, metadata={"help": "Queries per text and layer that `graph` looks at."})
    graph_learning_rate: float = field(default=1e-2, metadata={"help": "Peak of the schedule of `graph`."})
    alpha_start: float | None = field(default=None, metadata={"help": "Alpha grows from there to its own."})

    def __post_init__(self) -> None:
        check_choice("graph_loss", self.graph_loss, get_args(GraphLoss))
        check_integer("graph_steps", self.graph_steps, least=0)
        check_integer("graph_rows", self.graph_rows, least=1)
        check_number("graph_learning_rate", self.graph_learning_rate, most=1.0)
        if self.alpha_start is not None and not (is_finite(self.alpha_start) and 1 < self.alpha_start < 2):
            raise ValueError(f"alpha_start must be None or above 1 and below 2, got {self.alpha_start!r}")
