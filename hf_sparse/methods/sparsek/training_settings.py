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
        equal_steps: steps of `"distill"` or `"lm"` with as many selected keys for every KV head. Then what each head
            loses is measured, `k` is divided among the heads by it (`SparseKConfig.head_shares`), and the other steps
            begin. With 0 nothing is divided; nor is it in an encoder, where the adapter has shares already, or where
            it keeps whole prompts.
        lora_steps: with more than 0, LoRA is not trained beside the scorers but in so many optimiser steps of its own
            after theirs, on the same objective, with the hard selection of inference in place of soft gates.
    """

    objectives: ClassVar[Mapping[str, str]] = {"attention": "regress the attention that keys receive."}

    final_scale: float = field(
        default=1.0,
        metadata={"help": "Scores are multiplied by a factor that grows to this one: soft gates end almost hard."},
    )
    warm_start_steps: int = field(default=40, metadata={"help": "Steps of `attention` before the others."})
    equal_steps: int = field(
        default=60,
        metadata={
            "help": "Steps of the objective with equal heads; then k is divided among the KV heads by what each loses, "
            "and --steps follow. 0 divides nothing; an adapter that has shares keeps them."
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
        check_integer("equal_steps", self.equal_steps, least=0)
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
                "lora_steps must be 0 for the objective 'attention', which reads the model and trains no LoRA"
            )
