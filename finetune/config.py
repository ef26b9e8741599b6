"""Settings of a training run."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

Objective = Literal["distill", "attention", "lm"]
Precision = Literal["no", "bf16"]


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune`. The defaults are the recipe that was measured (model_cards/).

    Attributes:
        objective: `"distill"`: KL from the same model with sparse attention off (of a masked language model, at the
            hidden tokens); of a model without a language modelling head, 1 - cosine between their last hidden states
            and between the means of these. `"lm"`: the loss of the language modelling head. `"attention"`: regress the
            scores on the log of the dense attention that keys receive from queries outside the window.
        lm_weight: of the next-token cross-entropy that is added to `"distill"` of a causal language model.
        hidden_weight: of the distance of the layers' hidden states from the dense model's that is added to
            `"distill"` of a causal language model; 0 for a layer that repeats them, about 1 for one that has nothing to
            do with them.
        final_scale: scores are multiplied by a factor that grows from 1 to this one over the steps of the objective,
            geometrically: soft gates end as almost hard ones. Which keys are best does not depend on it.
        steps: optimiser steps of the objective.
        warm_start_steps: optimiser steps of `"attention"` before `"distill"` or `"lm"`.
        batch_size: chunks per step and process.
        gradient_accumulation_steps: batches per optimiser step.
        learning_rate: AdamW's peak; linear warm-up over `warmup_steps`, then linear decay to 0, in each stage.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        seed: order of the chunks (and, from the command line, which tokens are hidden from a masked language model).
            Nothing else is random; on CUDA, sums in another order still differ in the last bits
            unless `torch.use_deterministic_algorithms(True)` is set.
        mixed_precision: accelerate's `"bf16"`, or `"no"`: the dtype in which the model was loaded. Scores, gates and
            thresholds are float32 in any case.
        gradient_checkpointing: keep the inputs of layers only, and run them again in the backward: less memory, more
            time, the same result. `"attention"` holds no more than that anyway.
        cpu: stay on the CPU although there is an accelerator.
        output_dir: folder for `finetune.json` and `checkpoints/`; nothing is written for `None`.
        checkpoint_every: optimiser steps between checkpoints; 0 writes none.
        resume: continue from the last checkpoint in `output_dir`, if there is one.
        progress: show a progress bar.
    """

    objective: Objective = "distill"
    lm_weight: float = 0.0
    hidden_weight: float = 0.0
    final_scale: float = 1.0
    steps: int = 300
    warm_start_steps: int = 40
    batch_size: int = 2
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-2
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    cpu: bool = False
    output_dir: str | None = None
    checkpoint_every: int = 0
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}, got {self.objective!r}")
        if self.mixed_precision not in get_args(Precision):
            raise ValueError(
                f"mixed_precision must be one of {', '.join(get_args(Precision))}, got {self.mixed_precision!r}"
            )
        for name, least in (
            ("steps", 1),
            ("warm_start_steps", 0),
            ("batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("warmup_steps", 0),
            ("checkpoint_every", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise ValueError("learning_rate and max_grad_norm must be positive")
        if not self.lm_weight >= 0 or not self.hidden_weight >= 0:
            raise ValueError(
                f"lm_weight and hidden_weight must be at least 0, got {self.lm_weight!r} and {self.hidden_weight!r}"
            )
        if (self.lm_weight or self.hidden_weight) and self.objective != "distill":
            raise ValueError(f"lm_weight and hidden_weight belong to 'distill', the objective is {self.objective!r}")
        if not self.final_scale > 0 or (self.final_scale != 1 and self.objective == "attention"):
            raise ValueError(
                "final_scale must be positive, and 1 for the objective 'attention', which has no gates; got "
                f"{self.final_scale!r}"
            )
        if self.output_dir is None and (self.checkpoint_every or self.resume):
            raise ValueError("checkpoint_every and resume need an output_dir")

    @property
    def stages(self) -> list[tuple[Objective, int]]:
        """Objectives in order, each with its number of steps."""
        if self.objective == "attention" or self.warm_start_steps == 0:
            return [(self.objective, self.steps)]
        return [("attention", self.warm_start_steps), (self.objective, self.steps)]

    def settings(self) -> dict[str, object]:
        """What determines the result: everything but where it is written, what is shown and what it takes."""
        shown = {"output_dir", "checkpoint_every", "resume", "progress", "gradient_checkpointing"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shown}
