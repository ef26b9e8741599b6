"""The settings that `sweep.py` compares, each a change of a recipe."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What a sweep starts from.

    Attributes:
        adapter: fields of `SparseKConfig`.
        training: fields of `FinetuneConfig`.
        length: tokens of a training chunk.
        evaluation_length: tokens of a held-out chunk.
        evaluation_slots: budgets of the evaluation, by default.
    """

    adapter: dict[str, Any]
    training: dict[str, Any]
    length: int
    evaluation_length: int
    evaluation_slots: list[int]


@dataclass(frozen=True)
class Setting:
    """A change of a recipe.

    Attributes:
        about: what it is, for the table.
        adapter: fields of `SparseKConfig` that differ.
        training: fields of `FinetuneConfig` that differ.
        rate: multiplies the recipe's learning rate.
        shorter: divides the length of the training chunks and multiplies their number per step.
        longer: multiplies the steps.
    """

    about: str
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    shorter: int = 1
    longer: int = 1


RECIPES = {
    "demo": Recipe(
        adapter={"k": 20, "window": 8, "sinks": 4, "position_slope": 0.05, "learn_slope": False},
        training={"steps": 80, "warm_start_steps": 0, "batch_size": 2, "learning_rate": 1e-2},
        length=512,
        evaluation_length=1024,
        evaluation_slots=[32, 64],
    ),
    "default": Recipe(
        adapter={"k": 124, "window": 128, "sinks": 4, "learn_slope": False},
        training={"steps": 300, "warm_start_steps": 40, "batch_size": 2, "learning_rate": 2e-2},
        length=2048,
        evaluation_length=2048,
        evaluation_slots=[128, 256, 512, 1024],
    ),
}

SETTINGS = {
    "recipe": Setting("the recipe"),
    "rate-quarter": Setting("a quarter of the learning rate", rate=0.25),
    "rate-half": Setting("half the learning rate", rate=0.5),
    "rate-double": Setting("twice the learning rate", rate=2.0),
    "rate-x4": Setting("four times the learning rate", rate=4.0),
    "support-2": Setting("credit for the 2 k best keys", adapter={"support": 2}),
    "support-8": Setting("credit for the 8 k best keys", adapter={"support": 8}),
    "support-all": Setting("credit for all keys (exact SparseK)", adapter={"support": None}),
    "lm-0.1": Setting("plus 0.1 cross-entropy", training={"lm_weight": 0.1}),
    "lm-1": Setting("plus 1 cross-entropy", training={"lm_weight": 1.0}),
    "lm-only": Setting("cross-entropy instead of KL", training={"objective": "lm"}),
    "hidden-0.1": Setting("plus 0.1 distance of hidden states", training={"hidden_weight": 0.1}),
    "hidden-1": Setting("plus 1 distance of hidden states", training={"hidden_weight": 1.0}),
    "scale-4": Setting("scores times 1 to 4", training={"final_scale": 4.0}),
    "scale-16": Setting("scores times 1 to 16", training={"final_scale": 16.0}),
    "no-slope": Setting("no position slope", adapter={"position_slope": 0.0}),
    "slope": Setting("position slope 0.05 and no warm start", {"position_slope": 0.05}, {"warm_start_steps": 0}),
    "warm-start": Setting("40 steps on attention mass first", training={"warm_start_steps": 40}),
    "attention-only": Setting("attention mass instead of KL", training={"objective": "attention"}),
    "mlp": Setting("hidden layer of 128, a tenth of the learning rate", adapter={"scorer": "mlp"}, rate=0.1),
    "learn-slope": Setting("a position slope learned by each head", {"learn_slope": True}),
    "window-64": Setting("half the window", {"k": 188, "window": 64}),
    "window-32": Setting("a quarter of the window", {"k": 220, "window": 32}),
    "lora-8": Setting("plus LoRA of rank 8 on q, k, v, o", {"lora_rank": 8}),
    "lora-8-fast": Setting("plus LoRA of rank 8, 5 times its rate", {"lora_rank": 8}, {"lora_learning_rate": 1e-3}),
    "lora-8-after": Setting("LoRA of rank 8 afterwards, hard selection", {"lora_rank": 8}, {"lora_steps": 100}),
    "lora-8-after-fast": Setting(
        "the same at 5 times its rate", {"lora_rank": 8}, {"lora_steps": 100, "lora_learning_rate": 1e-3}
    ),
    "batch-4": Setting("4 chunks a step", training={"batch_size": 4}),
    "batch-8": Setting("8 chunks a step", training={"batch_size": 8}),
    "shorter": Setting("chunks of half the length, twice as many", shorter=2),
    "longer-run": Setting("twice the steps", longer=2),
}
