"""Where the time goes: GPU time of every kernel in one call, beside the time of the whole call.

    python benchmarks/profiles.py --output profiles.json

    attention   forward and backward with hard gates, shapes as in `attention_kernels.py`
    training    a step of the scorers of a SmolLM2-shaped model, as in `model.py`

A call whose kernels take much less time than it does is bound by the CPU that launches them. The JSON is written after
every call.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention_kernels import current_commit  # beside this file
from model import SMOLLM2, budget, make_model, prepare
from torch.profiler import ProfilerActivity, profile

from hf_sparse.files import write_json
from hf_sparse.finetune.objectives import distill
from hf_sparse.machine import describe
from hf_sparse.ops import sparsek_attention
from hf_sparse.patches import methods_in_use

NAMED = 20  # kernels of a call that are told apart
CALLS = 3  # that are timed without a profiler


def attention(length: int, device: str) -> Callable[[], object]:
    make = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    query = torch.randn(1, 32, length, 128, **make).requires_grad_()
    key, value = (torch.randn(1, 8, length, 128, **make).requires_grad_() for _ in range(2))
    scores, upstream = torch.randn(1, 8, length, device=device), torch.randn_like(query)

    def run() -> object:
        output = sparsek_attention(query, key, value, scores, k=512, window=512, sinks=0, gates="hard")
        return torch.autograd.grad(output, (query, key, value), upstream)

    return run


def training(length: int, options: argparse.Namespace) -> Callable[[], object]:
    model = make_model(options, SMOLLM2, torch.bfloat16 if options.device == "cuda" else torch.float32)
    prepare(model, "scorers", options)
    for method in methods_in_use(model):
        method.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=options.device)
    return lambda: torch.autograd.grad(distill(model, ids), learned)


def measure(run: Callable[[], object], device: str) -> dict[str, Any]:
    """Milliseconds of a call and of its kernels, the longest first."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(CALLS):
        run()
    wait()
    begin = time.perf_counter()
    for _ in range(CALLS):
        run()
    wait()
    row: dict[str, Any] = {"call_ms": 1e3 * (time.perf_counter() - begin) / CALLS}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        run()
        wait()
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if str(event.device_type).endswith("CUDA"):
            kernels.setdefault(event.name, []).append((event.time_range.end - event.time_range.start) / 1e3)
    row["kernels_ms"], row["launches"] = sum(map(sum, kernels.values())), sum(map(len, kernels.values()))
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:NAMED]
    row["kernels"] = [{"name": name, "ms": sum(times), "launches": len(times)} for name, times in longest]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 65536])
    parser.add_argument("--train", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the script out")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    # What `model.py` builds its model and budget from.
    options.contexts, options.steps = [max([*options.train, 1])], 0
    options.k, options.window, options.sinks = (12, 16, 4) if options.tiny else (508, 512, 4)
    slots = budget(options).slots
    result: dict[str, Any] = {"format": 1, "benchmark": "profiles", "commit": options.commit or current_commit()}
    result |= {**describe(), "slots": slots, "rows": []}
    jobs = [("attention", length) for length in options.lengths] + [("training", length) for length in options.train]
    for part, length in jobs:
        run = attention(length, options.device) if part == "attention" else training(length, options)
        row = {"part": part, "length": length, **measure(run, options.device)}
        print(f"{part:10} {length:7} {row['call_ms']:9.2f} ms, {row['kernels_ms']:9.2f} ms of kernels", flush=True)
        result["rows"].append(row)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
