"""Compare teachers whose time is linear in the length with the dense one, and the scorers that learn from each.

    python benchmarks/finetune_teacher.py teachers --model MODEL --text FILE --output finetune_teacher.json
    python benchmarks/finetune_teacher.py training --model MODEL --text FILE --output finetune_teacher_training.json

`teachers` measures the KL of linear teachers from the dense one on held-out text. `local` attends within a window in
one forward (`FinetuneConfig.teacher_window`), and to the `first` tokens of the text. `pieces` runs the dense model on
pieces of `window` tokens with as many before them, whose predictions are dropped, and with the `first` tokens of the
text in front.
`training` trains scorers from the same weights on the same chunks, with each teacher and with `lm`, and measures hard
selection on held-out text: KL from the dense model, and perplexity. `operations` is arithmetic and no measurement: the
operations of a linear teacher by those of the dense one.
"""

import argparse
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llamas import LLAMA_1B, LLAMA_8B  # beside this file
from measuring import current_commit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig, patch, unpatch
from hf_sparse.atomic_files import write_json
from hf_sparse.data import pack, read_text
from hf_sparse.environment import describe
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.objectives import dense_within, switched_off
from hf_sparse.finetune.predictions import predict
from hf_sparse.ops.divergence import divergence
from hf_sparse.ops.local_attention import FIRST, local_attention
from hf_sparse.patches import interface

SHAPES = {"1B": LLAMA_1B, "8B": LLAMA_8B}
LENGTHS = (8_192, 32_768, 131_072)


def operations(shape: dict[str, Any], length: int, kind: str, window: int = 0) -> float:
    """Return the operations of a forward without its head: products with weights, and of pairs of query and key."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = 2 * hidden * hidden * (1 + shape["num_key_value_heads"] / heads)  # query and output, key and value
    weights = shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])
    tokens, pairs = length, length * length / 2
    rest = max(0, length - 2 * window)
    if kind == "local":
        pairs = min(length, 2 * window) ** 2 / 2 + rest * (1.5 * window + FIRST)
    if kind == "pieces":
        tokens, pairs = min(length, window) + 2 * max(0, length - window), 2 * window * max(0, length - window)
        pairs += min(length, window) ** 2 / 2
    return 2 * weights * tokens + 4 * shape["num_hidden_layers"] * hidden * pairs


@torch.no_grad()
def states(model: nn.Module, chunk: Tensor, kind: str, window: int, first: int) -> Tensor:
    """Return what the head reads, `[T, C]`, of a teacher for a chunk `[1, T]`."""
    length = chunk.shape[1]
    if kind == "local":
        bounded = partial(local_attention, first=first)
        with mock.patch.object(interface, "local_attention", bounded), dense_within(model, length, window):
            return predict(model, chunk, use_cache=False).states[0]
    with switched_off(model):
        if kind == "dense":
            return predict(model, chunk, use_cache=False).states[0]
        pieces = []
        for start in range(0, length, window):
            stop, before = min(start + window, length), max(0, start - window)
            piece = torch.cat([chunk[:, : min(first, before)], chunk[:, before:stop]], dim=1)
            pieces.append(predict(model, piece, use_cache=False).states[0, start - stop :])
        return torch.cat(pieces)


@torch.no_grad()
def teacher_rows(model: nn.Module, chunks: Tensor, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Add a row for each linear teacher: its KL from the dense one, at every `--every`th token."""
    with switched_off(model):
        logits = predict(model, chunks[:1, :2], use_cache=False).logits
    kept = slice(None, None, options.every)
    dense = [states(model, chunk, "dense", 0, 0)[kept] for chunk in chunks.split(1)]
    kinds = [("local", FIRST), ("pieces", 0), ("local", 0), ("local", 1), ("pieces", 1)]
    for window in options.windows:
        for kind, first in kinds:
            found = []
            for chunk, expected in zip(chunks.split(1), dense, strict=True):
                mine = states(model, chunk, kind, window, first)[kept]
                found.append(float(divergence(logits(mine), logits(expected))) / len(mine))
            row = {"teacher": kind, "window": window, "first": first, "kl": statistics.mean(found), "kls": found}
            add(result, row, options)


@torch.no_grad()
def quality(model: nn.Module, chunks: Tensor) -> dict[str, float]:
    """Return KL from the dense model per token and perplexity of hard selection, on chunks `[N, T]`."""
    kls, losses = [], []
    for chunk in chunks.split(1):
        with switched_off(model):
            expected = predict(model, chunk, use_cache=False)
        found = predict(model, chunk, use_cache=False)
        scores = found.logits(found.states[0])
        kls.append(float(divergence(scores, expected.logits(expected.states[0]))) / chunk.shape[1])
        losses.append(float(nn.functional.cross_entropy(scores[:-1].float(), chunk[0, 1:])))
    return {"kl": statistics.mean(kls), "perplexity": math.exp(statistics.mean(losses))}


def training_rows(
    model: Any, seen: Tensor, held_out: Tensor, options: argparse.Namespace, result: dict[str, Any]
) -> None:
    """Add a row for each way to train, with held-out quality before and after."""
    runs: list[dict[str, Any]] = [{}, *({"teacher_window": window} for window in options.windows), {"objective": "lm"}]
    for seed in range(options.seeds):
        for run in runs:
            torch.manual_seed(seed)
            patch(model, SparseKConfig(k=options.k, window=options.window, sinks=options.sinks))
            if "before" not in result:
                result["before"] = quality(model, held_out)
                print(result["before"], flush=True)
            settings: dict[str, Any] = {"steps": options.steps, "warm_start_steps": options.warm_start_steps}
            settings |= {"batch_size": options.batch_size, "seed": seed, "progress": False, "divide_heads": False}
            settings |= {"learning_rate": options.learning_rate, "warmup_steps": options.warmup_steps}
            metrics = finetune(model, seen, FinetuneConfig(**settings, **run))
            row: dict[str, Any] = {"objective": metrics["objective"], "window": run.get("teacher_window", 0)}
            row |= {"seed": seed, **quality(model, held_out), "seconds": metrics["seconds"]}
            unpatch(model)
            add(result, row, options)


def add(result: dict[str, Any], row: dict[str, Any], options: argparse.Namespace) -> None:
    """Add a row to the JSON and write it."""
    result["rows"].append(row)
    print(row, flush=True)
    write_json(options.output, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=["teachers", "training"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a chunk")
    parser.add_argument("--seen", type=int, default=110, help="chunks to train on, the first ones of the text")
    parser.add_argument("--measured", type=int, default=4, help="chunks to measure, the next ones")
    parser.add_argument("--windows", type=int, nargs="*", default=[256, 512], help="windows of the linear teachers")
    parser.add_argument("--every", type=int, default=4, help="tokens between two that `teachers` compares")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm-start-steps", type=int, default=0)
    parser.add_argument("--warmup-steps", type=int, default=FinetuneConfig().warmup_steps)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=FinetuneConfig().learning_rate)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--k", type=int, default=188)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chunks = pack(tokenizer, read_text(str(options.text)), options.length)
    seen, held_out = chunks[: options.seen], chunks[options.seen :][: options.measured].to(device)
    config = SparseKConfig(k=options.k, window=options.window, sinks=options.sinks)
    names = ("part", "length", "every", "steps", "warm_start_steps", "warmup_steps", "batch_size", "learning_rate")
    result: dict[str, Any] = {"format": 1, "benchmark": "finetune_teacher"}
    result |= {"commit": options.commit or current_commit(), **describe(), "model": Path(options.model).name}
    result |= {name: getattr(options, name) for name in names}
    result |= {"text": options.text.name, "seen": len(seen), "measured": len(held_out), "rows": []}
    result["slots"] = {"k": config.k, "window": config.window, "sinks": config.sinks}
    result["operations"] = [
        {"shape": name, "tokens": length, "teacher": kind, "window": window}
        | {"share": operations(shape, length, kind, window) / operations(shape, length, "dense")}
        for name, shape in SHAPES.items()
        for length in LENGTHS
        for kind, window in (("local", 2048), ("local", 4096), ("pieces", 4096))
    ]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model.to(device).eval().requires_grad_(False)
    if options.part == "teachers":
        patch(model, config)
        teacher_rows(model, held_out, options, result)
    else:
        training_rows(model, seen, held_out, options, result)


if __name__ == "__main__":
    main()
