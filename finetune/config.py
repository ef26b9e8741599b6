"""Settings of a training run."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal, get_args

from hf_sparse.core.checks import is_finite, is_integer

Objective = Literal["distill", "attention", "lm", "graph"]
GraphLoss = Literal["profile_nce", "pair_hinge", "sum_hinge", "mass_hinge", "info_nce"]
Precision = Literal["no", "bf16"]

# The least and the largest value of each setting. Beyond the largest nothing was ever learned, or no machine holds it.
_INTEGERS = {
    "steps": (1, 10**7),
    "warm_start_steps": (0, 10**7),
    "graph_steps": (0, 10**7),
    "lora_steps": (0, 10**7),
    "graph_rows": (1, 10**7),
    "batch_size": (1, 10**7),
    "gradient_accumulation_steps": (1, 10**7),
    "warmup_steps": (0, 10**7),
    "checkpoint_every": (0, 10**7),
    "seed": (0, 2**32 - 1),
}
_NUMBERS = {
    "learning_rate": ("above 0", 1.0),
    "lora_learning_rate": ("above 0", 1.0),
    "graph_learning_rate": ("above 0", 1.0),
    "max_grad_norm": ("above 0", 1e9),
    "weight_decay": ("at least 0", 1e3),
    "lm_weight": ("at least 0", 1e6),
    "hidden_weight": ("at least 0", 1e6),
    "final_scale": ("above 0", 1e6),
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune`, for both methods. The defaults are the recipe that was measured (model_cards/).

    SparseK learns scorers: `warm_start_steps` of `"attention"`, then `steps` of the objective. Sparsefinder learns
    logit scales (and alpha, if it is to be learned) in `steps` of the objective, then projections in `graph_steps` of
    `"graph"`; in the end its predictors are fitted to the text. A setting of the other method is an error.

    Attributes:
        objective: `"distill"`: KL from the same model with sparse attention off (of a masked language model, at the
            hidden tokens); of a model without a language modelling head, 1 - cosine between their last hidden states
            and between the means of these. `"lm"`: the loss of the language modelling head. `"attention"`: regress the
            scores on the log of the dense attention that keys receive from queries outside the window (SparseK).
            `"graph"`: projections only, with the logit scales as they are (Sparsefinder).
        lm_weight: of the next-token cross-entropy that is added to `"distill"` of a causal language model.
        hidden_weight: of the distance of the layers' hidden states from the dense model's that is added to
            `"distill"` of a causal language model; 0 for a layer that repeats them, about 1 for one that has nothing to
            do with them.
        final_scale: SparseK: scores are multiplied by a factor that grows from 1 to this one over the steps of the
            objective, geometrically: soft gates end as almost hard ones. Which keys are best does not depend on it.
        steps: optimiser steps of the objective.
        warm_start_steps: SparseK: optimiser steps of `"attention"` before `"distill"` or `"lm"`.
        graph_steps: Sparsefinder: optimiser steps of `"graph"` after `"distill"` or `"lm"`. With 0 the projections stay
            as they are and nothing is fitted.
        graph_loss: Sparsefinder: what projections are trained with, on the entmax probabilities of the model itself.
            `"info_nce"`: cross entropy of the probabilities and a softmax of minus the distances; `"profile_nce"`: the
            same with the distance profile of the head in the softmax, as in the predictors; `"pair_hinge"`: the
            paper's; `"sum_hinge"`: that of its released code; `"mass_hinge"`: edges weighted by probability. See
            `hf_sparse.ops.predictors.losses`.
        graph_rows: Sparsefinder: queries per text and layer that `"graph"` looks at, drawn anew for each step; at least
            1.
        graph_learning_rate: Sparsefinder: the peak of `"graph"`.
        alpha_start: Sparsefinder: alpha grows from this value, above 1, to its own over the steps of the objective;
            not where it is learned. None: no annealing.
        batch_size: chunks per step and process.
        gradient_accumulation_steps: batches per optimiser step.
        learning_rate: AdamW's peak, at most 1; linear warm-up over `warmup_steps`, then linear decay to 0, in each
            stage.
        lora_learning_rate: the peak for LoRA, where the adapter has a `lora_rank`. It is trained with `"distill"` and
            `"lm"`, in the same optimiser, beside the scorers or logit scales.
        lora_steps: SparseK: with more than 0, LoRA is not trained beside the scorers but in so many optimiser steps
            of its own after theirs, on the same objective, with the hard selection of inference in place of soft gates.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm, those of LoRA apart.
        seed: order of the chunks (and, from the command line, which tokens are hidden from a masked language model).
            Nothing else is random; on CUDA, sums in another order still differ in the last bits
            unless `torch.use_deterministic_algorithms(True)` is set.
        mixed_precision: accelerate's `"bf16"`, or `"no"`: the dtype in which the model was loaded. Scores, gates and
            thresholds are float32 in any case.
        gradient_checkpointing: keep the inputs of layers only, and run them again in the backward: less memory, more
            time, the same result. `"attention"` holds no more than that anyway.
        cpu: stay on the CPU although there is an accelerator.
        output_dir: folder for `checkpoints/` and `finetune.json`; nothing is written for `None`. Where it holds an
            adapter, finetune.json is left to whoever writes the new weights (`hf_sparse.hub.write_repo`). No other run
            may use it meanwhile.
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
    graph_steps: int = 100
    graph_loss: GraphLoss = "profile_nce"
    graph_rows: int = 128
    graph_learning_rate: float = 1e-2
    alpha_start: float | None = None
    batch_size: int = 2
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-2
    lora_learning_rate: float = 2e-4
    lora_steps: int = 0
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
        for name, options in (("mixed_precision", get_args(Precision)), ("graph_loss", get_args(GraphLoss))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        for name, (fewest, most) in _INTEGERS.items():
            value = getattr(self, name)
            if not is_integer(value, fewest):
                raise ValueError(f"{name} must be an integer of at least {fewest}, got {value!r}")
            if value > most:
                raise ValueError(f"{name} must be at most {most:,}, got {value!r}")
        for name, (least, bound) in _NUMBERS.items():
            value = getattr(self, name)
            if not is_finite(value) or not (value >= 0 if least == "at least 0" else value > 0):
                raise ValueError(f"{name} must be a number {least}, got {value!r}")
            if value > bound:
                raise ValueError(f"{name} must be at most {bound:g}, got {value!r}")
        if self.alpha_start is not None and not (is_finite(self.alpha_start) and 1 < self.alpha_start < 2):
            raise ValueError(f"alpha_start must be None or above 1 and below 2, got {self.alpha_start!r}")
        if (self.lm_weight or self.hidden_weight) and self.objective != "distill":
            raise ValueError(f"lm_weight and hidden_weight belong to 'distill', the objective is {self.objective!r}")
        if self.final_scale != 1 and self.objective == "attention":
            raise ValueError(
                f"final_scale must be 1 for the objective 'attention', which has no gates; got {self.final_scale!r}"
            )
        if self.lora_steps and self.objective == "attention":
            raise ValueError(
                "lora_steps must be 0 for the objective 'attention', which reads the model and trains no LoRA"
            )
        if self.output_dir is None and (self.checkpoint_every or self.resume):
            raise ValueError("checkpoint_every and resume need an output_dir")

    def settings(self, without: Collection[str] = ()) -> dict[str, object]:
        """What determines the result: everything but where it is written, what is shown and what it takes.

        Args:
            without: fields that are left out too, such as those of another method.
        """
        shown = {"output_dir", "checkpoint_every", "resume", "progress", "gradient_checkpointing", *without}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shown}
