"""Define the training settings of SparseK; without torch, for the command line makes options of the fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from hf_sparse.core.settings import TrainingSettings, check_integer, check_number


@dataclass(frozen=True)
class SparseKTrainingSettings(TrainingSettings):
    """Hold what `FinetuneConfig` takes for SparseK besides the settings of every method.

    Attributes:
        final_scale: scores are multiplied by a factor that grows from 1 to this one over the steps of the objective,
            geometrically: soft gates end as almost hard ones. Which keys are best does not depend on it.
        warm_start_steps: optimiser steps of `"attention"` before `"distill"` or `"lm"`.
        divide_heads: after a fifth of the steps of `"distill"` or `"lm"`, in which every KV head has `k` selected keys,
            measure what each head loses and divide the keys among the heads by it (`SparseKConfig.head_shares`). It is
            left out in an encoder, in a model with one KV head, with fewer than five steps, and for an adapter that has
            shares already or keeps whole prompts.
        lora_steps: with more than 0, LoRA is not trained beside the scorers but in so many optimiser steps of its own
            after theirs, on the same objective, with the hard selection of inference in place of soft gates.
    """

    objectives: ClassVar[Mapping[str, str]] = {"attention": "regress the attention that keys receive."}

    final_scale: float = field(
        default=1.0,
        metadata={"help": "Scores are multiplied by a factor that grows to this one: soft gates end almost hard."},
    )
    warm_start_steps: int = field(default=40, metadata={"help": "Steps of `attention` before the others."})
    divide_heads: bool = field(
        default=True,
        metadata={
            "help": "After a fifth of the steps, divide k among the KV heads by what each loses; an adapter that has "
            "shares keeps them."
        },
    )
    lora_steps: int = field(
        default=0,
        metadata={
            "help": "Steps of LoRA alone after the others, with hard selection; 0 trains it beside the scorers.",
            "needs_lora": True,
        },
    )

    def __post_init__(self) -> None:
        check_integer("warm_start_steps", self.warm_start_steps, least=0)
        if not isinstance(self.divide_heads, bool):
            raise ValueError(f"divide_heads must be True or False, got {self.divide_heads!r}")
        check_integer("lora_steps", self.lora_steps, least=0)
        check_number("final_scale", self.final_scale, most=1e6)

    def check_objective(self, objective: str) -> None:
        if objective != "attention":
            return
        if self.final_scale != 1:
            raise ValueError(
                f"final_scale must be 1 for the objective 'attention', which has no gates; got {self.final_scale!r}"
            )
        if self.lora_steps:
            raise ValueError(
                "lora_steps must be 0 for the objective 'attention', which reads the model and trains no LoRA; "
                f"got {self.lora_steps!r}"
            )
