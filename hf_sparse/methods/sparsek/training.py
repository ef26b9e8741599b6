"""Training SparseK's scorers: an optional warm start on dense attention's mass, then soft gates in the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_sparse.errors import DataError
from hf_sparse.finetune.objectives import UNSETTLED
from hf_sparse.finetune.training import Stage, Training
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.ops import sparsek

_ADAPTER = (
    "k",
    "window",
    "sinks",
    "scorer",
    "scorer_hidden_size",
    "position_slope",
    "learn_slope",
    "layer_shares",
    "support",
    "layers",
    "lora_rank",
    "lora_alpha",
    "base_shape",
)


class SparseKTraining(Training):
    """All stages train the scorers; `distill` and `lm` train LoRA as well, where there is one, or after them."""

    label = "SparseK"
    learned = "scorers"
    objectives = ("distill", "attention", "lm")
    own = frozenset({"warm_start_steps", "final_scale", "lora_steps"})
    methods: list[SparseKAttention]

    def _stages(self) -> list[Stage]:
        config = self.config
        scorers = self._named(p for method in self.methods for p in method.sparsek_scorer[method.active].parameters())
        warm = Stage("attention", config.warm_start_steps, scorers, config.learning_rate, repeatable=False)
        if config.objective == "attention":
            return [Stage("attention", config.steps, scorers, config.learning_rate, repeatable=False)]
        after = bool(self.lora and config.lora_steps)
        learned = scorers if after else scorers | self.lora
        stages = [warm] if config.warm_start_steps else []
        stages.append(Stage(config.objective, config.steps, learned, config.learning_rate))
        if after:
            stages.append(Stage(config.objective, config.lora_steps, self.lora, config.lora_learning_rate, hard=True))
        return stages

    def identity(self) -> dict[str, Any]:
        return {name: getattr(self.methods[0].config, name) for name in _ADAPTER}

    def check(self, chunks: Tensor) -> None:
        length, slots = chunks.shape[1], max(method.config.slots for method in self.methods)
        if length <= slots:
            raise DataError(
                f"chunks of {length} tokens cannot train a budget of {slots} slots (k + window + sinks): every key is "
                "kept, so there would be no gradient; use longer chunks or a smaller budget"
            )
        needed = max(method.budget.sinks + method.budget.window for method in self.methods) + UNSETTLED + 2
        if self.methods[0].causal and self.stages[0].name == "attention" and length < needed:
            raise DataError(
                f"chunks of {length} tokens are too short for the objective `attention`, which needs {needed} (sinks + "
                f"window + {UNSETTLED + 2}); use longer chunks, or warm_start_steps=0"
            )

    def enter(self, stage: Stage, read: Callable[[], Any]) -> None:
        for method in self.methods:
            method.train(not stage.hard)

    @contextmanager
    def step(self, stage: Stage, step: int, number: int, *, logged: bool) -> Iterator[dict[str, Any]]:
        row: dict[str, Any] = {}
        scale = 1.0  # the warm start has no gates
        if stage.name == self.config.objective and not stage.hard:
            scale = self.config.final_scale ** (step / max(1, stage.steps - 1))
        support: list[float] = []
        soft = stage.repeatable and not stage.hard
        with _scaled(self.methods, scale), _supports(self.methods, support if logged and soft else None):
            yield row
        if scale != 1:
            row["score_scale"] = scale
        if support:
            row["support"] = sum(support) / len(support)


@contextmanager
def _scaled(methods: list[SparseKAttention], scale: float) -> Iterator[None]:
    """Scores times `scale` within a `with` block."""

    def multiply(module: nn.Module, args: Any, scores: Tensor) -> Tensor:
        return scale * scores

    scorers = [method.sparsek_scorer[method.active] for method in methods if scale != 1]
    hooks = [scorer.register_forward_hook(multiply) for scorer in scorers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _supports(methods: list[SparseKAttention], into: list[float] | None) -> Iterator[None]:
    """Measures, over the forwards inside a `with` block, how many keys the gates of the last query spread over."""
    hooks = []
    if into is not None:
        for method in methods:
            hooks.append(method.sparsek_scorer[method.active].register_forward_hook(_measure(method, into)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _measure(method: SparseKAttention, into: list[float]) -> Any:
    def hook(module: nn.Module, args: Any, scores: Tensor) -> None:
        budget = method.budget
        end = scores.shape[-1] - (budget.window if method.causal else 0)
        eligible = scores.detach()[..., budget.sinks : end]
        support = method.config.soft_support(budget.k)
        if support is not None:
            eligible = eligible.topk(min(support, eligible.shape[-1])).values
        into.append(float((sparsek(eligible, budget.k) > 0).sum(-1).float().mean()))

    return hook
