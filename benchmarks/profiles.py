"""Where the time goes: GPU time of every kernel in one call, beside the time of the whole call.

    python benchmarks/profiles.py --output profiles.json

    attention   forward and backward with hard gates, shapes as in `attention_kernels.py`
    training    a step of the scorers of a SmolLM2-shaped model, as in `model.py`
    decoding    a step of an 8B-shaped model through `generate`, compiled: sparse, and dense with a static cache

A call whose kernels take much less time than it does is bound by the CPU that launches them, or, where one CUDA graph
launches them all, by the CPU between two graphs. The JSON is written after every call.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llamas import LLAMA_8B, SMOLLM2  # beside this file
from measuring import current_commit, kernels_of, profiler, wait
from model import SKIPPED, Watch, budget, filled, make_model, prepare, steps
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.finetune.objectives import distill
from hf_sparse.ops import sparsek_attention
from hf_sparse.patches import sparse_layers_in_use

CALLS = 3  # that are timed without a profiler
STEPS = 8  # decoding steps under the profiler, and twice as many without


def attention(length: int, device: str) -> Callable[[], object]:
    make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
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
    for layer in sparse_layers_in_use(model):
        layer.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=options.device)
    return lambda: torch.autograd.grad(distill(model, ids), learned)


def measure(run: Callable[[], object], device: str, *, profiled: bool = True) -> dict[str, Any]:
    """Milliseconds of a call and, if it is profiled, of its kernels, the longest first."""
    for _ in range(CALLS):
        run()
    wait(device)
    begin = time.perf_counter()
    for _ in range(CALLS):
        run()
    wait(device)
    row: dict[str, Any] = {"call_ms": 1e3 * (time.perf_counter() - begin) / CALLS}
    if not profiled:
        return row
    with profiler(device) as found:
        run()
        wait(device)
    return row | kernels_of(found.events(), 1)


class Profiled(Watch):
    """Steps of `generate`; the last ones under the profiler."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.profiler = profiler(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = len(self.marks)
        if number in (SKIPPED + 2 * STEPS, SKIPPED + 3 * STEPS):
            wait(scores.device.type)
            self.profiler.start() if number == SKIPPED + 2 * STEPS else self.profiler.stop()
        return super().__call__(input_ids, scores)

    def row(self) -> dict[str, Any]:
        found = self.milliseconds()[: 2 * STEPS - 1]
        return {"call_ms": statistics.median(found), **kernels_of(self.profiler.events() or [], STEPS)}


def decoding(model: PreTrainedModel, variant: str, context: int, options: argparse.Namespace) -> dict[str, Any]:
    prepare(model, variant, options)
    new, watch = SKIPPED + 3 * STEPS + 1, Profiled(options.device)
    for run in (Watch(), watch):  # the first one compiles
        steps(model, filled(model, variant, options.batch, context, new), options.batch, context, new, run, eager=False)
    return watch.row()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 65536])
    parser.add_argument("--train", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--decode", type=int, nargs="*", default=[4096], help="contexts")
    parser.add_argument("--batch", type=int, default=1, help="rows of a decoding step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the script out")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    # What `model.py` builds its model and budget from.
    options.contexts, options.steps = [max([*options.train, *options.decode, 1])], 0
    options.k, options.window, options.sinks = (12, 16, 4) if options.tiny else (508, 512, 4)
    slots = budget(options).slots
    result: dict[str, Any] = {"format": 1, "benchmark": "profiles", "commit": options.commit or current_commit()}
    result |= {**describe(), "slots": slots, "rows": []}

    def add(row: dict[str, Any]) -> None:
        name = row.get("variant", row["part"])
        print(
            f"{name:10} {row['length']:7} {row['call_ms']:9.2f} ms, {row['kernels_ms']:9.2f} ms of kernels", flush=True
        )
        result["rows"].append(row)
        write_json(options.output, result)

    for length in options.lengths:
        add({"part": "attention", "length": length, **measure(attention(length, options.device), options.device)})
    for length in options.train:
        add({"part": "training", "length": length, **measure(training(length, options), options.device)})
    if options.decode:
        model = make_model(options, LLAMA_8B, torch.bfloat16 if options.device == "cuda" else torch.float32)
    for context in options.decode:
        for variant in ("sparse", "static"):
            row = {"part": "decoding", "variant": variant, "length": context, "batch": options.batch}
            add(row | decoding(model, variant, context, options))


if __name__ == "__main__":
    main()
