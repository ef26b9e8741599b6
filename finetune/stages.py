"""Define what the loop asks of a method: which parameters are trained, in which stages, and on which loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from peft import PeftConfig
from torch import Tensor, nn

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.registry import config_names, method_of
from hf_sparse.core.settings import TrainingSettings, values_of
from hf_sparse.data import IGNORED
from hf_sparse.environment import launched_processes
from hf_sparse.finetune.config import FinetuneConfig, SharedSettings
from hf_sparse.finetune.objectives import OBJECTIVES
from hf_sparse.model_kinds import kind_of
from hf_sparse.patches import sparse_layers_in_use

# Fields of a method's configuration that say nothing about what is trained, besides those of PEFT.
_FILLED_IN = {"target_modules", "modules_to_save", "saves_embeddings"}


@dataclass(frozen=True)
class Stage:
    """Describe a number of optimiser steps on one loss.

    Attributes:
        name: of the loss.
        steps: optimiser steps.
        parameters: by name, those that it trains.
        learning_rate: the peak; for LoRA's parameters it is `FinetuneConfig.lora_learning_rate`.
        repeatable: whether layers can be run again in the backward (`gradient_checkpointing`).
        hard: whether attention is that of inference, and not the one with a gradient for what a method learns.
    """

    name: str
    steps: int
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    repeatable: bool = True
    hard: bool = False

    @property
    def label(self) -> str:
        """Return the name that the history has for it."""
        return "lora" if self.hard else self.name


class Training:
    """Train what one method learns. A subclass knows its method; the loop knows none.

    What is here trains all that a method learns, with LoRA where there is one, in one stage on `distill` or `lm`. A
    subclass adds settings, stages and objectives.

    Attributes:
        learned: a word for the parameters that it trains.
        objectives: the values of `FinetuneConfig.objective` that the method offers. `distill` and `lm` are those of
            `hf_sparse.finetune.objectives`; a subclass computes others in `loss`.
        lm_weight: the default of `FinetuneConfig.lm_weight`, for `distill` of a causal language model.
        settings_type: the class of the method's own settings.
        layers: the model's sparse attention layers, from first to last.
        settings: the method's own settings, an object of `settings_type`.
        lora: LoRA's parameters by name in the model; none without a `lora_rank`.
        stages: in the order in which they are trained.
    """

    learned: str = "parameters"
    lm_weight: ClassVar[float] = 0.0
    objectives: ClassVar[tuple[str, ...]] = ("distill", "lm")
    settings_type: ClassVar[type[TrainingSettings]] = TrainingSettings
    layers: Sequence[SparseAttentionLayer]
    settings: TrainingSettings

    def __init__(self, model: nn.Module, layers: Sequence[SparseAttentionLayer], config: FinetuneConfig) -> None:
        self.model, self.layers, self.config, self.kind = model, layers, config, kind_of(model)
        self.settings = self._settings_of(config)
        self._check_objective()
        low_ranks = [layer.lora[layer.active] for layer in layers if layer.active in layer.lora]
        self.lora = self._named(parameter for low_rank in low_ranks for parameter in low_rank.parameters())
        self._check_lora_settings()
        self.stages = self._stages()
        if self.lora.keys() & self.parameters.keys():
            self.learned = f"{self.learned} and LoRA"

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters that some stage trains, by name in the model."""
        return {name: parameter for stage in self.stages for name, parameter in stage.parameters.items()}

    def recorded_settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as finetune.json and checkpoints hold them."""
        settings = self.config.settings() | {"lm_weight": self._lm_weight} | values_of(self.settings)
        without_effect = set() if self.lora else {name for name, _ in self._lora_settings()}
        return {name: value for name, value in settings.items() if name not in without_effect}

    def identity(self) -> dict[str, Any]:
        """Return the fields of the method's configuration for which the parameters of a checkpoint were trained."""
        config = self.layers[0].config
        ignored = {field.name for field in fields(PeftConfig)} | _FILLED_IN
        return {name: value for name, value in values_of(config).items() if name not in ignored}

    def default_identity(self) -> dict[str, Any]:
        """Return the defaults of the fields of `identity`, of those that have one."""
        defaults = {field.name: field.default for field in fields(self.layers[0].config)}
        return {name: defaults[name] for name in self.identity() if defaults[name] is not MISSING}

    def check(self, chunks: Tensor) -> None:
        """Raise `DataError` for chunks `[N, T]` that this method cannot learn from."""

    def retrieval(self, chunks: Tensor) -> float:
        """Return the share of chunks `[N, T]` of a causal language model that get facts (`hf_sparse.retrieval`)."""
        return 0.0

    def plan(self, chunks: Tensor) -> str:
        """Say in a sentence what a run on chunks `[N, T]` is going to do."""
        steps = ", then ".join(f"{stage.steps} steps of {stage.label}" for stage in self.stages)
        count, length = chunks.shape
        return f"{self.learned}: {steps}; {self.config.batch_size} of {count} chunks of {length} tokens at a time"

    def resume(self, report: dict[str, Any]) -> None:
        """Take up what the report of a stopped run says that it had decided; it is the one that `begin` returned."""

    def undo(self) -> None:
        """Take back what steps on trial have decided; their weights are taken back elsewhere."""

    def enter(self, stage: Stage, read: Callable[[], Any]) -> None:
        """Prepare for a stage: called before its first step, and before the first step of a resumed run.

        Args:
            stage: that begins or goes on.
            read: runs the model on training text.
        """

    @contextmanager
    def step(self, stage: Stage, step: int, number: int, *, logged: bool) -> Iterator[dict[str, Any]]:
        """Surround the forwards of one optimiser step; the dict that it yields joins the row of the history afterwards.

        Args:
            stage: of the step.
            step: its number within the stage.
            number: its number within the run.
            logged: whether to measure what costs time.
        """
        yield {}

    def problem(self, stage: Stage, row: Mapping[str, Any]) -> str | None:
        """Say what is wrong with a step, for a warning while the run can still be stopped; `None` for nothing.

        Args:
            stage: of the step.
            row: of the history, with what `step` yielded.
        """
        return None

    def loss(self, stage: Stage, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the loss of a batch: chunks `[B, T]`, and the labels of a masked language model."""
        options: dict[str, Any] = dict(self.mixture) if stage.name == "distill" else {}
        if stage.name == "distill" and self.config.teacher_window:
            options["teacher_window"] = self.config.teacher_window
        return OBJECTIVES[self.kind][stage.name](model, *batch, **options)

    def targets(self, stage: Stage, *batch: Tensor) -> int | None:
        """Count the tokens that the loss of a batch is the mean over; `None` in a stage whose batches have as many.

        The loop weighs each batch of an optimiser step by it. Of a masked language model these are the hidden tokens.
        """
        if self.kind == "masked" and stage.name in OBJECTIVES["masked"]:
            return int((batch[1] != IGNORED).sum())
        return None

    def begin(self, model: nn.Module, *batch: Tensor) -> dict[str, Any]:
        """Measure a batch before the first step, and return what `finetune.json` tells of it besides the history."""
        return {}

    def finish(self, model: nn.Module, read: Callable[[], Any], *batch: Tensor, report: dict[str, Any]) -> None:
        """Measure the batch again after the last step, into the report, and fit what is fitted.

        Args:
            model: as in `loss`.
            read: runs the model on training text.
            *batch: that of `begin`.
            report: what `begin` returned.
        """

    @property
    def mixture(self) -> dict[str, float]:
        """Return the weights of what is added to the objective `distill`, by name; those of 0 are left out."""
        weights = {"lm_weight": self._lm_weight, "hidden_weight": self.config.hidden_weight}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def _lm_weight(self) -> float:
        """Return the weight of the cross-entropy in `distill`."""
        if self.config.lm_weight is not None:
            return self.config.lm_weight
        return self.lm_weight if self.config.objective == "distill" and self.kind == "causal" else 0.0

    def _stages(self) -> list[Stage]:
        """Return the stages for the configuration, in order; raise `ValueError` for settings that do not fit."""
        containers = [getattr(layer, layer.adapter_layer_names[0])[layer.active] for layer in self.layers]
        learned = self._named(parameter for container in containers for parameter in container.parameters())
        return [Stage(self.config.objective, self.config.steps, learned | self.lora, self.config.learning_rate)]

    def _settings_of(self, config: FinetuneConfig) -> TrainingSettings:
        """Return the method's own settings; those of another method are an error where they were changed."""
        known = {field.name for field in fields(self.settings_type)}
        if foreign := [name for name in config.method_settings if name not in known]:
            raise ValueError(f"{', '.join(foreign)}: no setting for {self.layers[0].label}, which this model has")
        settings = self.settings_type(**config.method_settings)
        settings.check_objective(config.objective)
        return settings

    def _check_objective(self) -> None:
        config = self.config
        if config.objective not in self.objectives:
            raise ValueError(
                f"{self.layers[0].label} has no objective {config.objective!r}; choose one of "
                f"{', '.join(self.objectives)}"
            )
        if config.objective == "lm" and "lm" not in OBJECTIVES[self.kind]:
            possible = [name for name in self.objectives if name != "lm"]
            raise ValueError(
                "the objective 'lm' needs a model with a language modelling head, which this has not; "
                f"choose one of {', '.join(possible)}"
            )
        if self.mixture and self.kind != "causal":
            raise ValueError(
                f"lm_weight and hidden_weight are for causal language models, got a model of the kind {self.kind!r}"
            )
        if config.teacher_window and self.kind != "causal":
            raise ValueError(f"teacher_window is for causal language models, got a model of the kind {self.kind!r}")

    def _check_lora_settings(self) -> None:
        changed = [name for name, is_changed in self._lora_settings() if is_changed]
        if changed and not self.lora:
            raise ValueError(f"{', '.join(changed)}: the adapter has no LoRA, its lora_rank is 0")

    def _lora_settings(self) -> Iterator[tuple[str, bool]]:
        """Yield the name of each setting that is for adapters with LoRA alone, and whether it was changed."""
        for settings_type, settings in ((SharedSettings, self.config), (self.settings_type, self.settings)):
            for field in fields(settings_type):
                if field.metadata.get("needs_lora"):
                    yield field.name, getattr(settings, field.name) != field.default

    def _named(self, parameters: Iterator[nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return parameters by their names in the model, in its order."""
        identities = {id(parameter) for parameter in parameters}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in identities}


def chunks_read(model: nn.Module, config: FinetuneConfig) -> int:
    """Count the chunks that all steps of a run read, in all processes that were launched together."""
    steps = sum(stage.steps for stage in training_of(model, config).stages)
    return steps * config.batch_size * config.gradient_accumulation_steps * launched_processes()


def training_of(model: nn.Module, config: FinetuneConfig) -> Training:
    """Return the training of the method that a model has.

    Raises:
        TypeError: what wraps a model, such as the result of `torch.compile`.
        ValueError: the model has no sparse attention, or it is switched off, or there are settings that have no effect
            on it.
    """
    layers = sparse_layers_in_use(model)
    if not layers:
        raise ValueError(
            f"the model has no sparse attention: use peft.get_peft_model(model, config) with a {config_names()} first"
        )
    if not layers[0].is_active:
        raise ValueError(
            "finetune trains sparse attention that is switched on, and that of this model is off: call it outside of "
            "disable_adapter()"
        )
    training: type[Training] = method_of(layers[0].config).training()
    return training(model, layers, config)
