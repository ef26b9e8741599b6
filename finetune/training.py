"""What the loop asks of a method: what is trained, in which stages, and on what loss."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_sparse.data import IGNORED
from hf_sparse.finetune.config import FinetuneConfig, Objective
from hf_sparse.finetune.objectives import OBJECTIVES
from hf_sparse.model_kinds import kind_of


@dataclass(frozen=True)
class Stage:
    """Some steps on one loss.

    Attributes:
        name: of the loss.
        steps: optimiser steps.
        parameters: by name, those that it trains.
        learning_rate: the peak, of LoRA's parameters `FinetuneConfig.lora_learning_rate`.
        repeatable: whether layers can be run again in the backward (`gradient_checkpointing`).
        hard: whether attention is that of inference, and not the one with a gradient for what a method learns.
    """

    name: Objective
    steps: int
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    repeatable: bool = True
    hard: bool = False

    @property
    def label(self) -> str:
        """What the history calls it."""
        return "lora" if self.hard else self.name


class Training:
    """The training of one method. A subclass knows one method, the loop none.

    Attributes:
        label: what the method is called.
        learned: what the parameters that it trains are called.
        objectives: names of `FinetuneConfig.objective` that it has.
        own: the fields of `FinetuneConfig` that are for this method alone.
        lora: LoRA's parameters by name in the model; none without a `lora_rank`.
    """

    label: ClassVar[str]
    learned: str
    objectives: ClassVar[tuple[str, ...]]
    own: ClassVar[frozenset[str]]

    def __init__(self, model: nn.Module, methods: list[Any], config: FinetuneConfig) -> None:
        self.model, self.methods, self.config, self.kind = model, methods, config, kind_of(model)
        self._check_settings()
        in_use = [method.lora[method.active] for method in methods if method.active in method.lora]
        self.lora = self._named(parameter for low_rank in in_use for parameter in low_rank.parameters())
        self.stages = self._stages()
        if self.lora.keys() & self.parameters.keys():
            self.learned = f"{self.learned} and LoRA"

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained in some stage, by name in the model."""
        return {name: parameter for stage in self.stages for name, parameter in stage.parameters.items()}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint's parameters were trained for."""
        raise NotImplementedError

    def check(self, chunks: Tensor) -> None:
        """Raise `DataError` for chunks `[N, T]` that this method cannot learn from."""

    def enter(self, stage: Stage, read: Callable[[], Any]) -> None:
        """Before the first step of a stage, and before the first one of a resumed run; see `finish`."""

    @contextmanager
    def step(self, stage: Stage, step: int, number: int, *, logged: bool) -> Iterator[dict[str, Any]]:
        """Around the forwards of one optimiser step; what it yields joins the row of the history afterwards.

        Args:
            stage: of the step.
            step: its number within the stage.
            number: its number within the run.
            logged: whether to measure what costs time.
        """
        yield {}

    def loss(self, stage: Stage, model: nn.Module, *batch: Tensor) -> Tensor:
        """The loss of a batch: chunks `[B, T]`, and the labels of a masked language model."""
        options = self.mixture if stage.name == "distill" else {}
        return OBJECTIVES[self.kind][stage.name](model, *batch, **options)

    def targets(self, stage: Stage, *batch: Tensor) -> int:
        """Count the tokens that the loss of a batch is the mean over, where batches have different numbers of them.

        The loop weighs each batch of an optimiser step by it. Of a masked language model these are the hidden tokens;
        losses over all tokens, or as many queries of each batch, count as 1.
        """
        if self.kind == "masked" and stage.name in ("distill", "lm"):
            return int((batch[1] != IGNORED).sum())
        return 1

    def begin(self, model: nn.Module, *batch: Tensor) -> dict[str, Any]:
        """What `finetune.json` tells besides the history, measured on a batch before the first step."""
        return {}

    def finish(self, model: nn.Module, read: Callable[[], Any], *batch: Tensor, report: dict[str, Any]) -> None:
        """After the last step: measure the batch again into the report, and fit what is fitted.

        Args:
            model: as in `loss`.
            read: runs the model on training text.
            *batch: that of `begin`.
            report: what `begin` returned.
        """

    @property
    def mixture(self) -> dict[str, float]:
        """What is added to the objective `distill`."""
        weights = {"lm_weight": self.config.lm_weight, "hidden_weight": self.config.hidden_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def _stages(self) -> list[Stage]:
        raise NotImplementedError

    def _check_settings(self) -> None:
        config = self.config
        if config.objective not in self.objectives:
            raise ValueError(
                f"{self.label} has no objective {config.objective!r}; choose one of {', '.join(self.objectives)}"
            )
        if config.objective == "lm" and "lm" not in OBJECTIVES[self.kind]:
            possible = [name for name in self.objectives if name != "lm"]
            raise ValueError(
                "the objective 'lm' needs a model with a language modelling head, which this has not; "
                f"choose one of {', '.join(possible)}"
            )
        if self.mixture and self.kind != "causal":
            raise ValueError("lm_weight and hidden_weight are for causal language models, which this model is not")

    def _named(self, parameters: Iterator[nn.Parameter]) -> dict[str, nn.Parameter]:
        """Parameters by their names in the model."""
        wanted = {id(parameter) for parameter in parameters}
        return {name: p for name, p in self.model.named_parameters() if id(p) in wanted}


def foreign_settings(config: FinetuneConfig, foreign: frozenset[str]) -> list[str]:
    """Those of the fields in `foreign` that were changed."""
    return [f.name for f in fields(config) if f.name in foreign and getattr(config, f.name) != f.default]
