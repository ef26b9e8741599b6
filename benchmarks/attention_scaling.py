"""How SparseK attention scales with the length: time of the tiled implementation, forward and with its backward.

    python benchmarks/attention_scaling.py --output scaling.json

The tiles are first compared with the dense reference on a small odd size; without agreement nothing is measured.
`--dense` also times torch's own dense causal attention of the same shape.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.environment import describe
from hf_sparse.ops import sparsek_attention

BUDGET = {"k": 128, "window": 128, "sinks": 4}
SHAPE = {"batch": 1, "query_heads": 9, "kv_heads": 3, "dim": 64}
SUPPORT = 4 * BUDGET["k"]  # the default of SparseKConfig


def make_inputs(length: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and scores, all of which want gradients."""
    generator = torch.Generator().manual_seed(0)
    heads = (SHAPE["query_heads"], SHAPE["kv_heads"], SHAPE["kv_heads"])
    tensors = [torch.randn(SHAPE["batch"], h, length, SHAPE["dim"], generator=generator).to(dtype) for h in heads]
    tensors.append(torch.randn(SHAPE["batch"], SHAPE["kv_heads"], length, generator=generator))
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def attend(inputs: list[Tensor], gates: Any, implementation: Any = "tiled", **budget: Any) -> Tensor:
    if gates == "dense":
        query, key, value, _ = inputs
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    budget = budget or BUDGET
    support = 4 * budget["k"] if gates == "soft" else None
    return sparsek_attention(*inputs, **budget, gates=gates, support=support, implementation=implementation)


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative difference from the dense reference, of output and gradients together.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    differences = {}
    for gates in ("hard", "soft"):
        outcomes = []
        for implementation in ("tiled", "dense"):
            inputs = make_inputs(531, device, dtype)
            output = attend(inputs, gates, implementation, k=16, window=19, sinks=3)
            wanted = inputs if gates == "soft" else inputs[:3]
            outcomes.append(
                [output, *torch.autograd.grad((output * torch.linspace(-1, 1, 64).to(output)).sum(), wanted)]
            )
        differences[gates] = max(
            float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
            for ours, theirs in zip(*outcomes, strict=True)
        )
    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    if not all(difference <= allowed for difference in differences.values()):
        sys.exit(f"the tiles differ from the dense reference by {differences}, more than {allowed}: nothing measured")
    return differences


def measure(runs: list[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each run, `repeats` times after a warm-up; in turns, so that all see the machine in the same state."""

    def seconds(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    rounds = [[seconds(run) for run in runs] for _ in range(repeats + 1)]
    return [list(times) for times in zip(*rounds[1:], strict=True)]


def forward(inputs: list[Tensor], gates: str) -> Tensor:
    with torch.no_grad():
        return attend(inputs, gates)


def forward_backward(inputs: list[Tensor], gates: str) -> tuple[Tensor, ...]:
    wanted = inputs if gates == "soft" else inputs[:3]
    return torch.autograd.grad(attend(inputs, gates), wanted, torch.ones_like(inputs[0]))


def benchmark(
    lengths: list[int], device: torch.device, dtype: torch.dtype, repeats: int, dense: bool
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "attention_scaling",
        "settings": {**SHAPE, **BUDGET, "support": SUPPORT, "device": device.type, "dtype": str(dtype)[6:]},
        "difference_from_reference": check(device, dtype),
        "rows": [],
        "ratios": [],
        **describe(),
    }
    inputs = [make_inputs(length, device, dtype) for length in lengths]
    for gates in ("hard", "soft", "dense") if dense else ("hard", "soft"):
        for run in (forward, forward_backward):
            name = run.__name__
            everything = measure([partial(run, tensors, gates) for tensors in inputs], repeats, device)
            medians = [statistics.median(times) for times in everything]
            for length, times, median in zip(lengths, everything, medians, strict=True):
                fifths = statistics.quantiles(times, n=5, method="inclusive")
                row = {"gates": gates, "pass": name, "length": length, "repeats": repeats}
                result["rows"].append(row | {"seconds": median, "p20": fifths[0], "p80": fifths[-1]})
                print(f"{gates:5}  {name:16}  {length:6} tokens  {median:8.3f} s", flush=True)
            ratio = medians[-1] / medians[0]
            result["ratios"].append({"gates": gates, "pass": name, "of": [lengths[-1], lengths[0]], "ratio": ratio})
            print(f"{gates:5}  {name:16}  {lengths[-1]} / {lengths[0]}: {ratio:.2f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dense", action="store_true", help="also time torch's dense causal attention")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    result = benchmark(
        options.lengths, torch.device(options.device), getattr(torch, options.dtype), options.repeats, options.dense
    )
    if options.output:
        unfinished = options.output.with_suffix(".partial")
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        unfinished.replace(options.output)


if __name__ == "__main__":
    main()
