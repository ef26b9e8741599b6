"""Publish in three ways and load each of them elsewhere, as a user does; the environment says which Hub.

python three_ways.py push OWNER EXPECTED   # patch, train, push as adapter, full and merged, and note the outputs
python three_ways.py load OWNER EXPECTED   # in a new process without any local file: the same bits, and generate
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.demo import CHECKPOINT
from hf_sparse.finetune import FinetuneConfig
from hf_sparse.hub import save_full_model
from hf_sparse.workflow import create_adapter, train_adapter

FORMS = ("adapter", "full", "merged")
TEXT = "A key that leaves the window is kept if its score is among the best, and forgotten otherwise. " * 40


def push(owner: str, expected: Path) -> None:
    base = f"{owner}/three-ways-base"
    AutoModelForCausalLM.from_pretrained(CHECKPOINT).push_to_hub(base, max_shard_size="500KB")
    AutoTokenizer.from_pretrained(CHECKPOINT).push_to_hub(base)
    with tempfile.TemporaryDirectory() as temporary:
        folder, merged = Path(temporary, "adapter"), Path(temporary, "merged")
        create_adapter(base, hf_sparse.SparseKConfig(k=8, window=8, sinks=1, lora_rank=2), folder)
        settings = FinetuneConfig(objective="distill", steps=2, warm_start_steps=0, learning_rate=0.02, batch_size=1)
        train_adapter(folder, TEXT, settings, length=96, device="cpu")
        for form in FORMS:
            print(hf_sparse.push_to_hub(folder, f"{owner}/three-ways-{form}", form=form))
        save_full_model(folder, merged, form="merged")
        results = {}
        for form in FORMS:
            model = hf_sparse.from_pretrained(merged if form == "merged" else folder)
            results |= {f"{form}.{name}": tensor for name, tensor in outputs(model, base).items()}
        save_file(results, expected)


def load(owner: str, expected: Path) -> None:
    noted = load_file(expected)
    for form in FORMS:
        name = f"{owner}/three-ways-{form}"
        tokenizer = f"{owner}/three-ways-base" if form == "adapter" else name
        for kind, tensor in outputs(hf_sparse.from_pretrained(name), tokenizer).items():
            assert torch.equal(tensor, noted[f"{form}.{kind}"]), f"{kind} of {name} are others"
        print(f"{name}: the same bits")


@torch.no_grad()
def outputs(model, tokenizer: str) -> dict[str, torch.Tensor]:
    """The logits of a text that is longer than the budget, and what the model generates after it."""
    tokens = AutoTokenizer.from_pretrained(tokenizer)(TEXT[:200], return_tensors="pt").input_ids
    with model.disable_adapter():
        dense = model(input_ids=tokens).logits
    logits = model(input_ids=tokens).logits
    assert not torch.equal(logits, dense), "the model is dense"
    generated = model.generate(input_ids=tokens, max_new_tokens=12, do_sample=False)
    assert generated.shape[1] > tokens.shape[1]
    return {"logits": logits, "dense": dense, "generated": generated}


if __name__ == "__main__":
    {"push": push, "load": load}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
