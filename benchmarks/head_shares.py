"""How fast heads with different numbers of slots decode, beside equal heads with as many slots in all.

    python benchmarks/head_shares.py --output head_shares.json

Two patched models share random weights; one has `head_shares` that rise evenly over the KV heads of each layer, from
`--least` to as much above the mean. Bytes of their caches are compared first: they must be equal. Then the steps of
`generate` (eager, one kernel for a layer's step) and recorded steps (`CapturedDecoding`), and the time to the first
token, in calls that alternate in one process; each number is the median of several. A step takes the difference of two
calls of `FEW` and `MANY` new tokens, divided by the difference. Training is that of `finetune` with `distill` on random
tokens, in short runs that alternate: the median of the later steps of each. Only ratios of the same cell count.
"""

import argparse
import copy
import statistics
import sys
import time
from typing import Any

import torch
from generate import add_options
from llamas import SHAPES, make_llama  # beside this file
from measuring import current_commit
from recorded import MANY, draw, generate, time_step
from transformers import PreTrainedModel

from hf_sparse import CapturedDecoding, SparseKConfig, patch
from hf_sparse._compat import cache_of
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.patches.cache import kv_bytes

TRAINED, WARM = 12, 6  # optimiser steps of a run, and those of them that are not counted: they compile and record


def make_models(shape: dict[str, Any], options: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """Return two patched copies of a Llama with random weights, which share them."""
    longest = max([*options.prompts, *options.training]) + MANY
    how: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "device": options.device, "tiny": options.tiny}
    dense = make_llama(shape, longest, **how).requires_grad_(False)
    heads, layers = dense.config.num_key_value_heads, dense.config.num_hidden_layers
    rising = [options.least + 2 * (1 - options.least) * head / max(1, heads - 1) for head in range(heads)]
    shares = [rising[layer % heads :] + rising[: layer % heads] for layer in range(layers)]
    models = {}
    for name, given in (("equal", None), ("by heads", shares)):
        shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
        settings = SparseKConfig(k=options.k, window=options.window, sinks=options.sinks, head_shares=given)
        torch.manual_seed(1)
        models[name] = patch(copy.deepcopy(dense, shared), settings)
    return models


def cache_bytes(models: dict[str, PreTrainedModel]) -> int:
    """Return the bytes of keys and values, which must be those of the budget in both models.

    Raises:
        SystemExit: they differ.
    """
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            found[name] = kv_bytes(cache_of(model(draw(model, 8, 1), use_cache=True)))
    if len(set(found.values())) > 1:
        sys.exit(f"bytes of keys and values differ: {found}; nothing measured")
    return found["equal"]


def measure(models: dict[str, PreTrainedModel], prompt: int, batch: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of a step and to the first token, by model and loop, from calls that alternate."""
    ids = draw(models["equal"], prompt, batch)
    loops = {name: CapturedDecoding(model) for name, model in models.items()}
    steps: dict[str, list[float]] = {f"{name}, {loop}": [] for loop in ("eager", "recorded") for name in models}
    first: dict[str, list[float]] = {name: [] for name in models}
    for number in range(1 + rounds):
        for name, model in models.items():
            for loop in ("eager", "recorded"):
                milliseconds = time_step(model, ids, loops[name] if loop == "recorded" else None)
                if number:
                    steps[f"{name}, {loop}"].append(milliseconds)
            seconds_to_first = generate(model, ids, 1, None)[0]
            if number:
                first[name].append(1e3 * seconds_to_first)
    row: dict[str, Any] = {
        name: {"step_ms": statistics.median(times), "steps_ms": times} for name, times in steps.items()
    }
    row["first_token_ms"] = {name: statistics.median(times) for name, times in first.items()}
    for loop in ("eager", "recorded"):
        row[f"speed, {loop}"] = row[f"equal, {loop}"]["step_ms"] / row[f"by heads, {loop}"]["step_ms"]
    return row


def train(models: dict[str, PreTrainedModel], length: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of an optimiser step on one chunk of `length` tokens, by model."""
    steps: dict[str, list[float]] = {name: [] for name in models}
    settings: dict[str, Any] = {"steps": TRAINED, "warm_start_steps": 0, "batch_size": 1, "progress": False}
    for _ in range(rounds):
        for name, model in models.items():
            chunks = draw(model, length, TRAINED).cpu()
            config = FinetuneConfig(**settings, divide_heads=False, cpu=model.device.type == "cpu")
            history = finetune(model, chunks, config)["history"]
            model.eval()
            steps[name] += [1e3 * length / row["tokens_per_second"] for row in history[WARM:]]
    row: dict[str, Any] = {f"{name}, training": statistics.median(times) for name, times in steps.items()}
    return {"tokens": length, **row, "speed, training": row["equal, training"] / row["by heads, training"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048], help="tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--training", type=int, nargs="*", default=[2048], help="tokens of a chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.4, help="smallest share of a head")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no cell begins")
    add_options(parser)
    options = parser.parse_args()
    clock = time.monotonic()
    named = ("k", "window", "sinks", "least", "dtype", "rounds", "tiny")
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "head_shares",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in named},
        "rows": [],
        "training": [],
        **describe(),
    }
    for shape in options.shapes:
        models = make_models(SHAPES[shape], options)
        kept = cache_bytes(models)
        for prompt in options.prompts:
            for batch in options.batches:
                if time.monotonic() - clock > options.deadline:
                    break
                row = {"shape": shape, "prompt": prompt, "batch": batch, "kv_bytes_of_a_row": kept}
                row |= measure(models, prompt, batch, options.rounds)
                result["rows"].append(row)
                told = "  ".join(
                    f"{name} {part['step_ms']:.3f}"
                    for name, part in row.items()
                    if "," in name and isinstance(part, dict)
                )
                print(
                    f"{shape:10} {prompt:6} x {batch}  {told} ms; speed {row['speed, eager']:.3f} eager, "
                    f"{row['speed, recorded']:.3f} recorded; first token {row['first_token_ms']}",
                    flush=True,
                )
                if options.output:
                    write_json(options.output, result)
        for length in options.training:
            if time.monotonic() - clock > options.deadline:
                break
            result["training"].append({"shape": shape, **train(models, length, 2)})
            print(result["training"][-1], flush=True)
            if options.output:
                write_json(options.output, result)
        del models


if __name__ == "__main__":
    main()
