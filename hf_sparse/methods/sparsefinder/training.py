"""Training Sparsefinder: logit scales in the model, projections on its gold graph, then fitting the predictors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.errors import DataError
from hf_sparse.finetune.config import Objective
from hf_sparse.finetune.training import Stage, Training
from hf_sparse.methods.sparsefinder import SparsefinderAttention, SparsefinderConfig, fit_predictors
from hf_sparse.methods.sparsefinder.attention import AttentionInputs
from hf_sparse.methods.sparsefinder.fit import fit_profiles
from hf_sparse.methods.sparsefinder.graph_loss import graph_loss, observed
from hf_sparse.ops.entmax import support
from hf_sparse.ops.tiles.allowed import allowed_edges, positions_of

# Queries per text that the density is measured on.
_ROWS = 64


class SparsefinderTraining(Training):
    """`distill` and `lm` train the logit scales, alpha where it is learned, and LoRA where there is one; `graph` trains
    the projections.
    """

    label = "Sparsefinder"
    learned = "logit scales and projections"
    objectives = ("distill", "lm", "graph")
    own = frozenset({"graph_steps", "graph_loss", "graph_rows", "graph_learning_rate", "alpha_start"})
    methods: list[SparsefinderAttention]

    def _stages(self) -> list[Stage]:
        config, adapter = self.config, self.methods[0].config
        learned = [method.parameters_in_use for method in self.methods]
        learns_graph = learned[0].predictor.learns_graph
        if config.objective == "graph" and not learns_graph:
            raise ValueError(
                f"the objective 'graph' trains projections, and the predictor {adapter.predictor!r} has none: choose "
                "'distill' or 'lm'"
            )
        if config.alpha_start is not None and (adapter.learn_alpha or config.objective == "graph"):
            why = "alpha is learned here" if adapter.learn_alpha else "the objective 'graph' does not train with it"
            raise ValueError(f"alpha_start must be None, for {why}; got {config.alpha_start}")
        profiled = adapter.tile is not None and adapter.profile
        if learns_graph and config.graph_loss == "profile_nce" and not profiled:
            raise ValueError(
                "graph_loss='profile_nce' needs SparsefinderConfig(profile=True) and a tile: choose 'info_nce'"
            )
        graph = self._named(p for part in learned for p in part.projections())
        scales = self._named(p for part in learned for p in part.scales())
        if config.objective == "graph":
            return [Stage("graph", config.steps, graph, config.graph_learning_rate, repeatable=False)]
        main = Stage(config.objective, config.steps, scales | self.lora, config.learning_rate)
        if not learns_graph or not config.graph_steps:
            return [main]
        return [main, Stage("graph", config.graph_steps, graph, config.graph_learning_rate, repeatable=False)]

    @property
    def fits(self) -> bool:
        """Whether the predictors are fitted in the end."""
        return self.stages[-1].name == "graph"

    def identity(self) -> dict[str, Any]:
        others = {f.name for f in fields(PeftConfig)} | {"target_modules", "modules_to_save", "saves_embeddings"}
        own = {f.name for f in fields(SparsefinderConfig)} - others
        return {name: getattr(self.methods[0].config, name) for name in sorted(own)}

    def check(self, chunks: Tensor) -> None:
        adapter, length = self.methods[0].config, chunks.shape[1]
        if self.fits and adapter.tile is not None and length < 2 * adapter.tile:
            raise DataError(
                f"chunks of {length} tokens have no graph of tiles to learn from: expected at least two tiles of "
                f"{adapter.tile} tokens; use longer chunks or a smaller tile"
            )
        if self.fits and (needed := self.methods[0].parameters_in_use.predictor.points_needed) > chunks.numel():
            raise DataError(
                f"{chunks.numel()} training tokens are too few to fit {needed} {adapter.predictor} buckets: "
                "use more text, or fewer clusters or bins"
            )

    def enter(self, stage: Stage, read: Callable[[], Any]) -> None:
        if stage.name == "graph" and self.config.graph_loss == "profile_nce":
            fit_profiles(self.methods, read)

    @contextmanager
    def step(self, stage: Stage, step: int, number: int, *, logged: bool) -> Iterator[dict[str, Any]]:
        row: dict[str, Any] = {}
        self._number, self._batch = number, 0
        if stage.name == "graph":
            yield row
            return
        alpha, start = self.methods[0].config.alpha, self.config.alpha_start
        if start is not None:
            alpha = row["alpha"] = start + (alpha - start) * step / max(1, stage.steps - 1)
        shares: list[float] = []
        with _with_alpha(self.methods, alpha), observed(self.methods if logged else [], _density(shares)):
            yield row
        if shares:
            row["density"] = sum(shares) / len(shares)

    def loss(self, stage: Stage, model: nn.Module, *batch: Tensor) -> Tensor:
        if stage.name != "graph":
            return super().loss(stage, model, *batch)
        config = self.config
        seed = (config.seed * 1_000_003 + self._number) * config.gradient_accumulation_steps + self._batch
        self._batch += 1
        return graph_loss(model, self.methods, *batch, kind=config.graph_loss, rows=config.graph_rows, seed=seed)

    def begin(self, model: nn.Module, *batch: Tensor) -> dict[str, Any]:
        return {"scales": {"before": self._measure(model, *batch)}}

    def finish(self, model: nn.Module, read: Callable[[], Any], *batch: Tensor, report: dict[str, Any]) -> None:
        report.setdefault("scales", {})["after"] = self._measure(model, *batch)
        if self.fits:
            fit_predictors(self.methods, read, generator=torch.Generator().manual_seed(self.config.seed))

    @torch.no_grad()
    def _measure(self, model: nn.Module, *batch: Tensor) -> dict[str, float]:
        """The loss with entmax over all keys, and the density, on a batch."""
        shares: list[float] = []
        name: Objective = "distill" if self.config.objective == "graph" else self.config.objective
        with observed(self.methods, _density(shares)):
            loss = super().loss(Stage(name, 1, {}, 1.0), model, *batch)
        return {"loss": float(loss), "density": sum(shares) / len(shares)}


def _density(into: list[float]) -> Callable[[SparsefinderAttention], Callable[..., None]]:
    """Share of the allowed pairs that have a probability above 0, of each module, on some queries."""

    def observe(method: SparsefinderAttention) -> Callable[..., None]:
        def observer(text: AttentionInputs, *_: Any) -> None:
            length = text.key.shape[2]
            rows = torch.linspace(0, length - 1, min(length, _ROWS), device=text.key.device).round().long()
            options: dict[str, Any] = {"alpha": text.alpha, "scaling": text.scaling, "causal": text.causal}
            edges = support(text.query, text.key, rows=rows, **options)[0]
            allowed = allowed_edges(positions_of(length, length, rows), length, causal=text.causal).sum()
            into.append(float(edges.sum() / (allowed * edges.shape[0] * edges.shape[1])))

        return observer

    return observe


@contextmanager
def _with_alpha(methods: list[SparsefinderAttention], alpha: float) -> Iterator[None]:
    """Entmax with another alpha within a `with` block."""
    with override([method.config for method in methods], alpha=alpha):
        yield
