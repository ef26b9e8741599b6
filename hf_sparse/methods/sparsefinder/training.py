"""Train Sparsefinder: logit scales in the model, projections on its gold graph, then fitting the predictors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.errors import DataError
from hf_sparse.finetune.stages import Stage, Training
from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention
from hf_sparse.methods.sparsefinder.density import density_observer
from hf_sparse.methods.sparsefinder.fit import fit_predictors, fit_profiles
from hf_sparse.methods.sparsefinder.graph_loss import graph_loss
from hf_sparse.methods.sparsefinder.observing import observed
from hf_sparse.methods.sparsefinder.training_settings import SparsefinderTrainingSettings


class SparsefinderTraining(Training):
    """Train the logit scales, then the projections.

    `distill` and `lm` train the scales, alpha where it is learned, and LoRA where there is one; `graph` trains the
    projections, with the scales as they are. In the end the predictors are fitted to the text. A checkpoint that was
    trained with entmax (`entmax_native`) has no scales to train: it is its own teacher.
    """

    learned = "logit scales and projections"
    objectives = ("distill", "lm", "graph")
    settings_type = SparsefinderTrainingSettings
    layers: Sequence[SparsefinderAttention]
    settings: SparsefinderTrainingSettings

    def _stages(self) -> list[Stage]:
        config, settings = self.config, self.settings
        learned = [layer.parameters_in_use for layer in self.layers]
        learns_graph = learned[0].predictor.learns_graph
        if self.layers[0].config.entmax_native is not None:
            self.learned = "projections"
            self._check_native()
        self._check_settings(learns_graph)
        graph = self._named(p for part in learned for p in part.projections())
        scales = self._named(p for part in learned for p in part.scales())
        if config.objective == "graph":
            return [Stage("graph", config.steps, graph, settings.graph_learning_rate, repeatable=False)]
        main = Stage(config.objective, config.steps, scales | self.lora, config.learning_rate)
        if not learns_graph or not settings.graph_steps:
            return [main]
        return [main, Stage("graph", settings.graph_steps, graph, settings.graph_learning_rate, repeatable=False)]

    def _check_settings(self, learns_graph: bool) -> None:
        """Raise `ValueError` for an objective or a setting that does not go with the adapter.

        Args:
            learns_graph: whether its predictor has projections to train.
        """
        objective, settings, adapter = self.config.objective, self.settings, self.layers[0].config
        if objective == "graph" and not learns_graph:
            raise ValueError(
                f"the objective 'graph' trains projections, and the predictor {adapter.predictor!r} has none: choose "
                "'distill' or 'lm'"
            )
        is_native = adapter.entmax_native is not None
        if settings.alpha_start is not None and (adapter.learn_alpha or is_native or objective == "graph"):
            why = "the objective 'graph' does not train with it"
            if adapter.learn_alpha or is_native:
                why = f"alpha is {'learned here' if adapter.learn_alpha else 'that of the checkpoint (entmax_native)'}"
            raise ValueError(f"alpha_start must be None, for {why}; got {settings.alpha_start}")
        profiled = adapter.tile is not None and adapter.profile
        if learns_graph and settings.graph_loss == "profile_nce" and not profiled:
            raise ValueError(
                "graph_loss='profile_nce' needs SparsefinderConfig(profile=True) and a tile: choose 'info_nce'"
            )

    def _check_native(self) -> None:
        """Raise `ValueError` for an objective with nothing to learn in a checkpoint that was trained with entmax."""
        objective = self.config.objective
        if objective == "distill":
            raise ValueError(
                "the objective 'distill' has nothing to learn: this checkpoint was trained with entmax (entmax_native) "
                "and with sparse attention off it is no teacher; choose 'graph', which trains the projections"
            )
        if objective == "lm" and not self.lora:
            raise ValueError(
                "the objective 'lm' has nothing to learn: this checkpoint was trained with entmax (entmax_native), and "
                "the adapter has no LoRA; choose 'graph', which trains the projections, or patch with a lora_rank"
            )

    @property
    def fits(self) -> bool:
        """Tell whether the predictors are fitted in the end."""
        return self.stages[-1].name == "graph"

    def check(self, chunks: Tensor) -> None:
        adapter, length = self.layers[0].config, chunks.shape[1]
        if self.fits and adapter.tile is not None and length < 2 * adapter.tile:
            raise DataError(
                f"chunks of {length} tokens have no graph of tiles to learn from: expected at least two tiles of "
                f"{adapter.tile} tokens; use longer chunks or a smaller tile"
            )
        if self.fits and (needed := self.layers[0].parameters_in_use.predictor.points_needed) > chunks.numel():
            raise DataError(
                f"{chunks.numel()} training tokens are too few to fit {needed} {adapter.predictor} buckets: "
                "use more text, or fewer clusters or bins"
            )

    def enter(self, stage: Stage, read: Callable[[], Any]) -> None:
        if stage.name == "graph" and self.settings.graph_loss == "profile_nce":
            fit_profiles(self.layers, read)

    @contextmanager
    def step(self, stage: Stage, step: int, number: int, *, logged: bool) -> Iterator[dict[str, Any]]:
        row: dict[str, Any] = {}
        self._number = number
        if stage.name == "graph":
            yield row
            return
        alpha, start = self.layers[0].config.alpha, self.settings.alpha_start
        if start is not None:
            alpha = row["alpha"] = start + (alpha - start) * step / max(1, stage.steps - 1)
        densities: list[float] = []
        with (
            override([layer.config for layer in self.layers], alpha=alpha),
            observed(self.layers if logged else (), lambda layer: density_observer(densities)),
        ):
            yield row
        if densities:
            row["density"] = sum(densities) / len(densities)

    def loss(self, stage: Stage, model: nn.Module, *batch: Tensor) -> Tensor:
        if stage.name != "graph":
            return super().loss(stage, model, *batch)
        settings = self.settings
        # The same in all batches of a step, so that it does not matter how the chunks are divided into them.
        seed = self.config.seed * 1_000_003 + self._number
        return graph_loss(model, self.layers, *batch, kind=settings.graph_loss, rows=settings.graph_rows, seed=seed)

    @property
    def _measures(self) -> bool:
        """Tell whether entmax over all keys is compared with what was there before: not where it was there before."""
        return self.layers[0].config.entmax_native is None or self.config.objective != "graph"

    def begin(self, model: nn.Module, *batch: Tensor) -> dict[str, Any]:
        if not self._measures:
            return {}
        return {"scales": {"before": self._measure(model, *batch)}}

    def finish(self, model: nn.Module, read: Callable[[], Any], *batch: Tensor, report: dict[str, Any]) -> None:
        if self._measures:
            report.setdefault("scales", {})["after"] = self._measure(model, *batch)
        if self.fits:
            fit_predictors(self.layers, read, generator=torch.Generator().manual_seed(self.config.seed))

    @torch.no_grad()
    def _measure(self, model: nn.Module, *batch: Tensor) -> dict[str, float]:
        """Measure the loss with entmax over all keys, and the density, on a batch."""
        densities: list[float] = []
        name = "distill" if self.config.objective == "graph" else self.config.objective
        with observed(self.layers, lambda layer: density_observer(densities)):
            loss = super().loss(Stage(name, 1, {}, 1.0), model, *batch)
        return {"loss": float(loss), "density": sum(densities) / len(densities)}
