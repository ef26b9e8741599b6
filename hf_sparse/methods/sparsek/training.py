"""Train SparseK's scorers: an optional warm start on dense attention's mass, then soft gates in the model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from hf_sparse.core.overrides import overwrite
from hf_sparse.environment import is_main_process
from hf_sparse.errors import DataError
from hf_sparse.finetune import checkpoint
from hf_sparse.finetune.record import earlier_metrics
from hf_sparse.finetune.sharding import full
from hf_sparse.finetune.stages import Stage, Training
from hf_sparse.methods.sparsek.attention import SparseKAttention
from hf_sparse.methods.sparsek.attention_objective import UNSETTLED, attention
from hf_sparse.methods.sparsek.settings import WHOLE_PROMPT
from hf_sparse.methods.sparsek.training_settings import SparseKTrainingSettings
from hf_sparse.ops import sparsek
from hf_sparse.ops.selection.thresholds import MOST_LISTED

_COLLAPSED = 1  # keys over which gates spread, less k; runs that learned well ended with 4 to 50
_EQUAL = 5  # the part of the steps in which all heads select as many keys: a fifth
_CHUNKS = 4  # from all over the text, on which every head is measured; or fewer, where that would take longest
_TOKENS = MOST_LISTED  # of a chunk, the first ones, on which heads are measured, with lists of all keys
_FORWARDS = 4  # that a chunk costs in training: the teacher's, the model's, and a backward of two
_BUDGETS = 2  # at which a head is measured
_SLOPE_LENGTH = 1024  # of an adapter that has learned no slope yet
_RETRIEVAL = 0.5  # of the chunks have facts, of at least so many tokens (`_LONG`) and selected keys (`_MANY`)
_LONG, _MANY = 1024, 128


class _Competing(NamedTuple):
    """Hold the scores `[B, N]` among which a query selects `k` keys, with gates on the best `bound` of them only."""

    k: int
    bound: Any
    scores: Tensor


class SparseKTraining(Training):
    """Train the scorers in all stages; `distill` and `lm` train LoRA too, where there is one, beside or after them.

    In between the selected keys are divided among the KV heads, see `SparseKTrainingSettings.divide_heads`. An adapter
    that has learned no slope, selects 128 keys or more and leaves it open gets a `slope_length` before the first step.

    The objective `attention` regresses the scores on the log of the dense attention that keys receive from queries
    outside the window. `FinetuneConfig.gradient_checkpointing` has no effect on it, for it holds no more than that.
    """

    learned = "scorers"
    objectives = ("distill", "attention", "lm")
    lm_weight = 0.1
    settings_type = SparseKTrainingSettings
    layers: Sequence[SparseKAttention]
    settings: SparseKTrainingSettings
    _is_length_open = False  # whether this run gives the slopes their length
    _equal: Stage | None = None  # with as many selected keys for every head, before these are divided
    _main: Stage | None = None  # of the objective
    _report: dict[str, Any]  # what finetune.json tells of slopes and the division
    _measured_on: Tensor  # chunks
    _selected: float | None = None  # keys per KV head, in the step whose gates were measured last

    def _can_divide(self) -> bool:
        """Tell whether `k` is to be divided among the KV heads in between."""
        config = self.layers[0].config
        heads = sum(layer.num_key_value_heads for layer in self.layers)
        has_shares = config.layer_shares is not None or (config.head_shares is not None and not self._is_repeated())
        is_possible = self.kind == "causal" and config.k > 1 and heads > 1 and config.pin_prompt != WHOLE_PROMPT
        return self.settings.divide_heads and not has_shares and is_possible

    def _is_repeated(self) -> bool:
        """Tell whether the shares of the adapter are those that the run which is resumed came to before it ended."""
        latest = self._latest_checkpoint()
        if latest is None or "divide_heads" not in checkpoint.load_state(latest)["settings"]:
            return False  # nothing is resumed, or a later run that found the shares in the adapter
        division = earlier_metrics(latest.parent.parent).get("division")
        return isinstance(division, dict) and division.get("head_shares") == self.layers[0].config.head_shares

    def _decides_length(self) -> bool:
        """Tell whether this run gives the slopes their length: none was learned, and the configuration leaves it open.

        With few selected keys, which could not keep the facts of a long text, slopes stay as they are.
        A run that is resumed did so when it began, or never; after its end it finds the length in the adapter.
        """
        config, latest = self.layers[0].config, self._latest_checkpoint()
        if latest is not None:
            given = checkpoint.load_state(latest)["report"].get("slopes", {}).get("length")
            return given is not None and config.slope_length in (None, given)
        slopes = [layer.sparsek_scorer[layer.active].slope for layer in self.layers]
        is_open = config.slope_length is None and config.position_slope == 0 and config.k >= _MANY
        return is_open and not any(slope is None or bool(full(slope).any()) for slope in slopes)

    def _latest_checkpoint(self) -> Path | None:
        """Return the checkpoint that this run begins with."""
        output = self.config.output_dir
        return checkpoint.latest(Path(output)) if output and self.config.resume else None

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint was trained for: equal heads and slopes without a length, if this run gives them."""
        decided = {"head_shares": self._equal is not None, "slope_length": self._is_length_open}
        return super().identity() | {name: None for name, is_decided in decided.items() if is_decided}

    def recorded_settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, with `divide_heads` where heads are divided only.

        Checkpoints of runs that do not divide them, older ones too, are those of the same run.
        """
        settings = super().recorded_settings()
        if self._equal is None:
            del settings["divide_heads"]
        return settings

    def retrieval(self, chunks: Tensor) -> float:
        """Return the share of chunks with facts; none where chunks are short, or slots too few for the facts."""
        has_room = chunks.shape[1] >= _LONG and self.layers[0].config.k >= _MANY
        return _RETRIEVAL if has_room else 0.0

    def plan(self, chunks: Tensor) -> str:
        """Say in a sentence what a run on chunks `[N, T]` is going to do."""
        sentence = super().plan(chunks)
        if self._is_length_open:
            sentence += f". Slopes grow by the logarithm of positions after {_SLOPE_LENGTH:,} tokens"
        if self._equal is None or self._main is None:
            return sentence
        heads, config = sum(layer.num_key_value_heads for layer in self.layers), self.layers[0].config
        return (
            f"{sentence}. Before the last {self._main.steps} steps of {self._main.name}, the {config.k} of "
            f"{config.slots} slots that hold selected keys are divided among the {heads} KV heads by what each loses"
        )

    def _stages(self) -> list[Stage]:
        config, settings = self.config, self.settings
        self._is_length_open = self._decides_length()
        scorers = self._named(p for layer in self.layers for p in layer.sparsek_scorer[layer.active].parameters())
        if config.objective == "attention":
            return [Stage("attention", config.steps, scorers, config.learning_rate, repeatable=False)]
        stages = []
        if settings.warm_start_steps:
            warm_start = settings.warm_start_steps
            stages.append(Stage("attention", warm_start, scorers, config.learning_rate, repeatable=False))
        lora_afterwards = bool(self.lora and settings.lora_steps)
        learned = scorers if lora_afterwards else scorers | self.lora
        equal = config.steps // _EQUAL if self._can_divide() else 0
        if equal:
            self._equal = Stage(config.objective, equal, learned, config.learning_rate)
            stages.append(self._equal)
        self._main = Stage(config.objective, config.steps - equal, learned, config.learning_rate)
        stages.append(self._main)
        if lora_afterwards:
            stages.append(Stage(config.objective, settings.lora_steps, self.lora, config.lora_learning_rate, hard=True))
        return stages

    def check(self, chunks: Tensor) -> None:
        length, slots = chunks.shape[1], max(layer.config.slots for layer in self.layers)
        if length <= slots:
            raise DataError(
                f"chunks of {length} tokens cannot train a budget of {slots} slots (k + window + sinks): every key is "
                "kept, so there would be no gradient; use longer chunks or a smaller budget"
            )
        needed = max(layer.budget.sinks + layer.budget.window for layer in self.layers) + UNSETTLED + 2
        if self.layers[0].causal and self.stages[0].name == "attention" and length < needed:
            raise DataError(
                f"chunks of {length} tokens are too short for the objective `attention`, which needs {needed} (sinks + "
                f"window + {UNSETTLED + 2}); use longer chunks, or warm_start_steps=0"
            )
        heads = sum(layer.num_key_value_heads for layer in self.layers)
        read = self.config.steps * self.config.batch_size * self.config.gradient_accumulation_steps
        count = min(_CHUNKS, len(chunks), max(1, _FORWARDS * read // (_BUDGETS * heads)))
        measured = _TOKENS if 2 * slots < _TOKENS else length
        self._measured_on = chunks[[number * len(chunks) // count for number in range(count)], :measured]

    def begin(self, model: nn.Module, *batch: Tensor) -> dict[str, Any]:
        """Return what finetune.json tells of the slopes, and of the division once the heads are measured."""
        self._report = {}
        if self._is_length_open:
            self._report["slopes"] = {"length": _SLOPE_LENGTH}
            self._set_in_config(slope_length=_SLOPE_LENGTH)
        return self._report

    def resume(self, report: dict[str, Any]) -> None:
        """Divide `k` among the heads as the earlier run had at its checkpoint, or not yet, and take its slopes."""
        self._report = report
        if self._is_length_open:
            self._set_in_config(slope_length=report["slopes"]["length"])
        if self._equal is not None:
            self._set_in_config(head_shares=report.get("division", {}).get("head_shares"))

    def undo(self) -> None:
        if self._is_length_open:
            self._set_in_config(slope_length=None)
        if self._equal is not None:
            self._set_in_config(head_shares=None)

    def _set_in_config(self, **values: Any) -> None:
        """Set fields of the adapter's configuration, which is read-only since it was attached to the model."""
        overwrite([self.layers[0].config], **values)

    def enter(self, stage: Stage, read: Callable[[], Any]) -> None:
        if stage is self._main and self._equal is not None and "division" not in self._report:
            self._divide()
        for layer in self.layers:
            layer.train(not stage.hard)

    def _divide(self) -> None:
        """Measure what each KV head loses, and divide `k` among the heads by it, in all processes alike."""
        config = self.config
        # Late, for measuring imports the training of all methods.
        from hf_sparse.methods.sparsek.evaluation import divide_heads

        rows, damages = divide_heads(
            self.model,
            self._measured_on,
            batch_size=config.batch_size,
            progress=config.progress and is_main_process(),
        )
        device = next(self.model.parameters()).device
        shares = broadcast(torch.tensor(rows, dtype=torch.float64, device=device)).tolist()
        self._set_in_config(head_shares=shares)
        self._report["division"] = {
            "chunks": len(self._measured_on),
            "head_shares": shares,
            "damages": {str(k): list(of_heads.values()) for k, of_heads in damages.items()},
        }

    @contextmanager
    def step(self, stage: Stage, step: int, number: int, *, logged: bool) -> Iterator[dict[str, Any]]:
        row: dict[str, Any] = {}
        scale = 1.0  # the warm start has no gates
        if stage is self._main:
            scale = self.settings.final_scale ** (step / max(1, stage.steps - 1))
        competing: list[_Competing] = []
        has_soft_gates = stage.repeatable and not stage.hard
        with _scaled(self.layers, scale), _noted(self.layers if logged and has_soft_gates else (), competing):
            yield row
        if scale != 1:
            row["score_scale"] = scale
        if competing:
            row["support"] = _mean_support(competing)
            # A head whose `k` is larger than the text selects all keys.
            self._selected = fmean(min(one.k, one.scores.shape[-1]) for one in competing)

    def problem(self, stage: Stage, row: Mapping[str, Any]) -> str | None:
        k = max(layer.config.k for layer in self.layers) if self._selected is None else self._selected
        if row.get("support", math.inf) > k + _COLLAPSED or self.settings.final_scale != 1:
            return None
        return (
            f"the scores have collapsed: the gates spread over {row['support']:.1f} keys for k = {k:g}, so that next "
            "to no key gets a gradient; try a lower learning_rate"
        )

    def loss(self, stage: Stage, model: nn.Module, *batch: Tensor) -> Tensor:
        if stage.name != "attention":
            return super().loss(stage, model, *batch)
        options = {"use_cache": False, "logits_to_keep": 1} if self.kind == "causal" else {}
        return attention(model, batch[0], **options)


@contextmanager
def _scaled(layers: Sequence[SparseKAttention], scale: float) -> Iterator[None]:
    """Multiply the scores of layers by `scale` within a `with` block."""

    def multiply(module: nn.Module, args: Any, scores: Tensor) -> Tensor:
        return scale * scores

    with _hooked(layers if scale != 1 else (), lambda layer: multiply):
        yield


@contextmanager
def _noted(layers: Sequence[SparseKAttention], competing: list[_Competing]) -> Iterator[None]:
    """Note, at each forward within a `with` block, the scores among which the last query of each KV head selects.

    Nothing is computed from them meanwhile, for which every layer would wait for the GPU.

    Args:
        layers: those whose scores are noted.
        competing: gets what is noted.
    """

    def note(layer: SparseKAttention) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, scores: Tensor) -> None:
            budget = layer.budget
            end = scores.shape[-1] - (budget.window if layer.causal else 0)
            eligible = scores.detach()[..., budget.sinks : end]
            for head, k in enumerate(budget.per_head(eligible.shape[1])):
                competing.append(_Competing(k, layer.config.soft_support(k), eligible[:, head]))

        return hook

    with _hooked(layers, note):
        yield


def _mean_support(competing: Sequence[_Competing]) -> float:
    """Return over how many keys gates spread, the mean over KV heads and rows.

    All heads are projected together: that takes about a thousand launches, for one head or for all.
    """
    device = competing[0].scores.device
    of_length: dict[int, list[_Competing]] = {}
    for one in competing:
        of_length.setdefault(one.scores.shape[-1], []).append(one)
    supports = []
    for length, heads in of_length.items():
        numbers = [(one.k, length if one.bound is None else one.bound) for one in heads for _ in one.scores]
        k, bound = torch.tensor(numbers, device=device).unbind(-1)
        best_first = torch.cat([one.scores.to(device) for one in heads]).sort(-1, descending=True).values
        beyond = torch.arange(length, device=device) >= bound[:, None]
        supports.append((sparsek(best_first.masked_fill(beyond, -torch.inf), k) > 0).sum(-1))
    return float(torch.cat(supports).float().mean())


@contextmanager
def _hooked(
    layers: Sequence[SparseKAttention], hook_of: Callable[[SparseKAttention], Callable[..., Any]]
) -> Iterator[None]:
    """Give the scorer in use of each layer a forward hook for the length of a `with` block."""
    hooks = [layer.sparsek_scorer[layer.active].register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
