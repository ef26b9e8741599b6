"""TRL's trainers on a patched model."""

import pytest
from datasets import Dataset

trl = pytest.importorskip("trl", reason="needs the extra `composition`: run `make composition`")

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")  # TRL sets it

TEXTS = [
    text * 20 for text in ("import os\nimport sys\n", "def f(x):\n    return x\n", "class A:\n    pass\n", "x = 1\n")
]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(make, tokenizer, training, trained, packing):
    """`SFTTrainer` trains the scorers and nothing else, with its packing and without."""
    model = make()
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**training, max_length=128, packing=packing),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    trained(model, trainer.train)


def test_dpo(make, tokenizer, training, trained):
    """`DPOTrainer` trains the scorers; its reference is the base model with the adapter off."""
    model = make()
    pairs = {"prompt": TEXTS, "chosen": [" yes"] * 4, "rejected": [" no"] * 4}
    settings = trl.DPOConfig(**training, max_length=128)
    trained(
        model,
        trl.DPOTrainer(model, args=settings, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer).train,
    )


def test_grpo(make, tokenizer, training, trained):
    """`GRPOTrainer` generates with the slots and trains the scorers."""
    model = make()
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(n) for n in range(len(completions))],
        args=trl.GRPOConfig(**training, num_generations=2, max_completion_length=6),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
    )
    trained(model, trainer.train)
