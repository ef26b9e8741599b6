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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.machine import describe
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


def attend(inputs: list[Tensor], gates: Any, implementation: Any = "tiled", **budget: int) -> Tensor:
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
            float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(*outcomes, strict=True)
        )
    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    if not all(difference <= allowed for difference in differences.values()):
        sys.exit(f"the tiles differ from the dense reference by {differences}, more than {allowed}: nothing measured")
    return differences


def measure(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each run after two that do not count."""

    def seconds() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return [seconds() for _ in range(repeats + 2)][2:]


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
    for gates in ("hard", "soft", "dense") if dense else ("hard", "soft"):
        medians: dict[tuple[str, int], float] = {}
        for length in lengths:
            inputs = make_inputs(length, device, dtype)
            upstream = torch.ones_like(inputs[0])

            def forward(inputs: list[Tensor] = inputs, gates: str = gates) -> Tensor:
                with torch.no_grad():
                    return attend(inputs, gates)

            def both(inputs: list[Tensor] = inputs, gates: str = gates, upstream: Tensor = upstream) -> Any:
                wanted = inputs if gates == "soft" else inputs[:3]
                return torch.autograd.grad(attend(inputs, gates), wanted, upstream)

            for name, run in (("forward", forward), ("forward and backward", both)):
                times = measure(run, repeats, device)
                medians[name, length] = statistics.median(times)
                fifths = statistics.quantiles(times, n=5, method="inclusive")
                row = {"gates": gates, "pass": name, "length": length, "repeats": repeats}
                row |= {"seconds": medians[name, length], "p20": fifths[0], "p80": fifths[-1]}
                result["rows"].append(row)
                print(f"{gates:5}  {name:20}  {length:6} tokens  {row['seconds']:8.3f} s", flush=True)
        for name in ("forward", "forward and backward"):
            first, last = lengths[0], lengths[-1]
            ratio = medians[name, last] / medians[name, first]
            result["ratios"].append({"gates": gates, "pass": name, "of": [last, first], "ratio": ratio})
            print(f"{gates:5}  {name:20}  {last} / {first}: {ratio:.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dense", action="store_true", help="also time torch's dense causal attention")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    result = benchmark(
        options.lengths, torch.device(options.device), getattr(torch, options.dtype), options.repeats, options.dense
    )
    if options.output:
        partial = options.output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(options.output)


if __name__ == "__main__":
    main()
