"""Train the small Llama that hf-sparse bundles, on one GPU in minutes, from text that every Python already has.

    python model_cards/demo-llama/train.py corpus --output CORPUS     # writes CORPUS/{train,held_out}.txt.gz
    python model_cards/demo-llama/train.py train --corpus CORPUS --output OUT
    python model_cards/demo-llama/train.py card                        # writes README.md from metrics.json

`OUT/checkpoint` is an ordinary Hugging Face folder (bf16 safetensors, fast tokenizer); `OUT/metrics.json` holds every
number that the card quotes. The corpus is made apart from the training, so that a machine with a GPU and another
Python trains on the same text.
"""

import argparse
import gzip
import hashlib
import json
import math
import platform
import time
from pathlib import Path

SEPARATOR = "<|endoftext|>"
VOCAB, CONTEXT = 4096, 2048
SHAPE = dict(
    hidden_size=192,
    intermediate_size=480,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)


def make_corpus(output: Path) -> None:
    from hf_sparse.demo.text import documents

    output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "held_out"):
        text = SEPARATOR.join(documents(split, tests=True))
        (output / f"{split}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{split}: {len(text) / 1e6:.1f} M characters")


def read(corpus: Path, split: str) -> str:
    return gzip.decompress((corpus / f"{split}.txt.gz").read_bytes()).decode()


def make_tokenizer(text: str):
    """Byte-level BPE with digits one by one, so that no text is out of vocabulary and indentation stays cheap."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+|\n[ ]*|[ ]+(?=[ ])| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (text[i : i + 20_000] for i in range(0, len(text), 20_000))
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def train(corpus: Path, output: Path, steps: int, batch: int, lr: float, seed: int) -> None:
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = {split: read(corpus, split) for split in ("train", "held_out")}
    began = time.time()
    tokenizer = make_tokenizer(texts["train"])
    tokens = {
        split: torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, device=device)
        for split, text in texts.items()
    }
    print(
        {split: f"{len(t) / 1e6:.2f} M tokens" for split, t in tokens.items()},
        f"{time.time() - began:.0f} s",
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        **SHAPE,
    )
    model = LlamaForCausalLM(config).to(device)
    compiled = torch.compile(model.model) if device == "cuda" else model.model
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 200)
        return lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = compiled(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        return F.cross_entropy(logits.float().reshape(-1, VOCAB), ids[:, 1:].reshape(-1))

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        ids = tokens["held_out"]
        chunks = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:96]
        losses = [loss_of(part).item() for part in chunks.split(32) if len(part) == 32]
        model.train()
        return sum(losses) / len(losses)

    history, began, seen = [], time.time(), 0
    offsets = torch.arange(CONTEXT, device=device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        start = torch.randint(0, len(tokens["train"]) - CONTEXT, (batch, 1), device=device)
        loss = loss_of(tokens["train"][start + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += batch * CONTEXT
        if (step + 1) % 250 == 0 or step + 1 == steps:
            row = {
                "step": step + 1,
                "tokens": seen,
                "train_loss": loss.item(),
                "held_out_loss": evaluate(),
                "seconds": time.time() - began,
            }
            history.append(row)
            print(json.dumps(row), flush=True)

    folder = output / "checkpoint"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {
            split: {
                "characters": len(text),
                "tokens": len(tokens[split]),
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
            for split, text in texts.items()
        },
        "settings": {"steps": steps, "batch_sequences": batch, "context": CONTEXT, "lr": lr, "seed": seed},
        "history": history,
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: [en, code]
tags: [hf-sparse, llama]
---

# demo-llama

The small Llama that `hf-sparse demo` patches: it exists so that the whole job can be seen offline in minutes, on a model for
which keys beyond the window matter. It completes Python in the style of the standard library and is of no other use.

| | |
|---|---|
| parameters | {parameters:,} (bfloat16) |
| shape | {layers} layers, hidden size {hidden}, {heads} query and {kv} KV heads, vocabulary {vocab}, context {context} |
| training text | {train[tokens]:,} tokens: the standard library of CPython 3.11 with its tests, and the topics of `help()` |
| held-out text | {held_out[tokens]:,} tokens: whole modules (about 1 in 12, with their tests) that training never saw |
| training | {settings[steps]:,} steps of {settings[batch_sequences]} sequences, AdamW, learning rate {settings[lr]}, seed {settings[seed]}, {seconds:.0f} s on one {machine} |
| loss at the end | {last[train_loss]:.3f} on training text, {last[held_out_loss]:.3f} held out (nats per token) |

How it was made: `train.py` beside this file; every number is from `metrics.json`, which it wrote. The weights are in
`hf_sparse/demo/checkpoint/`. The split of the text is `hf_sparse/demo/text.py`; on another Python version the modules differ a
little, the split by name does not. The training text is under the Python Software Foundation License, the weights under
Apache-2.0.

Limits: {epochs:.0f} passes over a small text. The model knows much of the training text by heart; judge it on held-out modules only.
"""


def make_card() -> None:
    here = Path(__file__).parent
    metrics = json.loads((here / "metrics.json").read_text())
    last, corpus = metrics["history"][-1], metrics["corpus"]
    text = CARD.format(
        **metrics,
        **corpus,
        layers=SHAPE["num_hidden_layers"],
        hidden=SHAPE["hidden_size"],
        heads=SHAPE["num_attention_heads"],
        kv=SHAPE["num_key_value_heads"],
        vocab=VOCAB,
        context=CONTEXT,
        last=last,
        seconds=last["seconds"],
        epochs=last["tokens"] / corpus["train"]["tokens"],
    )
    (here / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("--output", type=Path, required=True)
    run = commands.add_parser("train")
    run.add_argument("--corpus", type=Path, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--steps", type=int, default=1200)
    run.add_argument("--batch", type=int, default=64)
    run.add_argument("--lr", type=float, default=3e-3)
    run.add_argument("--seed", type=int, default=0)
    commands.add_parser("card")
    options = vars(parser.parse_args())
    {"corpus": make_corpus, "train": train, "card": make_card}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
