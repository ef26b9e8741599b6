"""Search the sizes of the programs of the attention kernels: tiles, warps, stages and registers, one JSON.

    python benchmarks/sizes.py --output sizes.json

For every shape and kernel the sizes in use are measured first and then those of a grid, in the order of the time they
take. A size that needs more shared memory than there is, or that the compiler refuses, is left out. What a shape runs
with is chosen by the rule in `hf_sparse/ops/selection/triton/program_sizes.py`; this search shows what it costs.

First, on a small odd size, outputs and gradients with every size that is to be measured are compared with those in
float32; a size that disagrees ends the run. The JSON is written after every kernel.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import current_commit  # beside this file
from torch import Tensor

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.thresholds import ScanPlan
from hf_sparse.ops.selection.triton import attention, scan
from hf_sparse.ops.selection.triton.attention_backward import by_key, by_query
from hf_sparse.ops.selection.triton.attention_forward import forward
from hf_sparse.ops.selection.triton.lists import Tables, causal_tables, selection_tables
from hf_sparse.ops.selection.triton.program_sizes import ProgramSizes, by_key_sizes, by_query_sizes, forward_sizes
from hf_sparse.ops.triton.launch import compile_ahead

SHAPES = ("9/3x64", "12/12x64", "32/4x64", "32/8x64", "28/4x128", "32/8x128")
KERNELS = ("forward", "d query", "d key and d value")
CHECKED = 777  # tokens of the comparison
ALLOWED = 2e-2  # largest relative error of bfloat16


def grid(kernel: str, quick: bool) -> list[ProgramSizes]:
    """Return the sizes to try."""
    if kernel == "d key and d value":
        pairs = [(32, 64), (64, 64), (32, 128), (64, 128)]
        sizes = [ProgramSizes(*pair, warps, stages) for pair in pairs for warps in (4, 8) for stages in (2, 3)]
    else:
        settings = itertools.product((64, 128), (32, 64), (4, 8), (2, 3), (None, 128))
        # Eight warps are two groups that multiply 64 rows each.
        sizes = [ProgramSizes(*one) for one in settings if one[0] == 128 or one[2] == 4]
    return sizes[::6] if quick else sizes


class Call:
    """Hold the inputs of the kernels for one shape, with the selection and what the backward starts from."""

    def __init__(self, heads: int, kv_heads: int, dim: int, length: int, soft: bool, options: argparse.Namespace):
        generator = torch.Generator(options.device).manual_seed(length)
        draw = partial(torch.randn, generator=generator, device=options.device)
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.soft, self.scaling = soft, dim**-0.5
        query, grad = (draw(1, heads, length, dim).to(dtype) for _ in range(2))
        key, value = (draw(1, kv_heads, length, dim).to(dtype) for _ in range(2))
        self.scores = draw(1, kv_heads, length)
        size = options.support if soft else options.k
        plan = ScanPlan(options.k, min(size, length), length, options.window, options.tile, soft, True)
        settings = {"window": options.window, "sinks": options.sinks, "tile": options.tile}
        z = tau = None
        if soft:
            rank, floor, tau, lists, origin = scan.launch_scan(self.scores, plan, None, options.sinks, shift=True)
            tables, z = causal_tables(rank, floor, tau, lists, self.scores, origin, None, **settings)
        else:
            selection = scan.launch_selection(self.scores, plan, None, options.sinks)
            tables = selection_tables(selection, length, None, **settings)
        self.inputs = (grad, query, key, value, z, tau)
        self.tables = tables
        output, lse = forward(query, key, value, z, tau, tables, self.scaling)
        results = (*self.inputs, output, lse, tables, self.scaling)
        delta, _, _ = by_query(*results, d_scores=None, want_query=True, want_tau=soft)
        names = ("until", "lists", "leavers", "bounds", "scores", "ends")
        self.names = names
        self.tensors = (query, key, *self.inputs, output, lse, delta, *(getattr(tables, name) for name in names))

    def run(self, kernel: str, sizes: ProgramSizes | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Launch one kernel; `tensors` are those of the call, or meta tensors in their place."""
        _, _, grad, query, key, value, z, tau, output, lse, delta, *of_tables = tensors
        named: dict[str, Any] = dict(zip(self.names, of_tables, strict=True))
        tables: Tables = self.tables._replace(**named)
        assert query is not None and key is not None and value is not None
        if kernel == "forward":
            return forward(query, key, value, z, tau, tables, self.scaling, sizes)
        assert grad is not None and output is not None and lse is not None and delta is not None
        results = (grad, query, key, value, z, tau, output, lse, tables, self.scaling)
        if kernel == "d query":
            return by_query(*results, d_scores=None, want_query=True, want_tau=self.soft, blocks=sizes)
        d_scores = None if z is None else torch.empty_like(z)
        of_keys = by_key(*results, delta=delta, d_scores=d_scores, of_keys=True, deterministic=False, blocks=sizes)
        return (*of_keys, d_scores)

    def compile(self, kernel: str, sizes: list[ProgramSizes]) -> None:
        """Compile the kernel with all sizes, side by side."""

        def all_sizes(*tensors: Tensor) -> Tensor:
            for one in sizes:
                self.run(kernel, one, *tensors)
            return tensors[0]

        compile_ahead(all_sizes, *self.tensors, family=(kernel, self.soft, *sizes))

    def in_use(self, kernel: str) -> ProgramSizes:
        query, key = self.inputs[1:3]
        assert query is not None and key is not None
        if kernel == "forward":
            return forward_sizes(query, self.soft, True)
        if kernel == "d query":
            return by_query_sizes(query, True, self.soft)
        return by_key_sizes(query, query.shape[1] // key.shape[1])


def errors(call: Call, kernel: str, sizes: list[ProgramSizes], reference: list[Tensor]) -> dict[ProgramSizes, float]:
    """Return the largest relative error of every size that runs.

    Raises:
        SystemExit: an error that rounding does not explain.
    """
    differences = {}
    for one in sizes:
        try:
            results = call.run(kernel, one, *call.tensors)
        except Exception as error:  # too much shared memory, or what this version of the compiler cannot do
            print(f"  {kernel} {tuple(one)}: {type(error).__name__}", flush=True)
            continue
        pairs = zip((r for r in results if r is not None), reference, strict=False)
        differences[one] = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        if not differences[one] <= ALLOWED:
            sys.exit(f"{kernel} with {one} differs by {differences[one]}: nothing measured")
    return differences


def exact(call: Call, options: argparse.Namespace) -> dict[str, list[Tensor]]:
    """Compute what each kernel should return first, by the kernels in float32."""
    grad, query, key, value, *_ = (None if x is None else x.float() for x in call.inputs)
    assert grad is not None and query is not None and key is not None and value is not None
    leaves = [query, key, value]
    for tensor in leaves:
        tensor.requires_grad_()
    support = options.support if call.soft else options.k
    problem = Problem(
        query, key, value, call.scores, options.k, options.window, options.sinks, call.scaling, call.soft, support,
        None, True,
    )  # fmt: skip
    output = attention.causal_sparsek_attention(problem, tile=options.tile)
    d_query, d_key, d_value = torch.autograd.grad(output, leaves, grad)
    delta = (grad * output.detach()).sum(-1).unflatten(1, (key.shape[1], -1)).transpose(2, 3)
    doubles = [tensor.detach().double() for tensor in (output, delta, d_query, d_key, d_value)]
    return {"forward": doubles[:1], "d query": doubles[1:3], "d key and d value": doubles[3:]}


def milliseconds(run: Callable[[], object], options: argparse.Namespace) -> float:
    if options.device != "cuda":
        run()
        return 0.0
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=options.repeat_ms, return_mode="median"))


def search(shape: str, options: argparse.Namespace, soft: bool, add: Callable[[list[dict[str, Any]]], None]) -> None:
    """Measure all sizes of all kernels for one shape."""
    heads, dim = shape.split("x")
    query_heads, kv_heads = map(int, heads.split("/"))
    make = partial(Call, query_heads, kv_heads, int(dim), soft=soft, options=options)
    small = make(length=CHECKED)
    expected = exact(small, options)
    calls = {length: make(length=length) for length in options.lengths}
    for kernel in options.kernels:
        used = small.in_use(kernel)
        sizes = [used, *(one for one in grid(kernel, options.quick) if one != used)]
        small.compile(kernel, sizes)
        differences = errors(small, kernel, sizes, expected[kernel])
        rows = []
        for length, call in calls.items():
            for one, error in differences.items():
                row = {"shape": shape, "gates": "soft" if soft else "hard", "kernel": kernel, "length": length}
                time = milliseconds(partial(call.run, kernel, one, *call.tensors), options)
                rows.append(row | one._asdict() | {"in_use": one == used, "error": error, "median_ms": time})
        rows.sort(key=lambda row: (row["length"], not row["in_use"], row["median_ms"]))
        add(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="query heads / KV heads x head size")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--gates", nargs="+", choices=["hard", "soft"], default=["hard"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--support", type=int, default=2048)
    parser.add_argument("--tile", type=int, default=128, help="queries that share a list")
    parser.add_argument("--repeat-ms", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="a sixth of the grid, for a trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    names = ("lengths", "k", "window", "sinks", "support", "tile", "repeat_ms", "device")
    result: dict[str, Any] = {
        "format": 2,
        "benchmark": "sizes",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in names},
        **describe(),
        "rows": [],
    }

    def add(rows: list[dict[str, Any]]) -> None:
        result["rows"] += rows
        write_json(options.output, result)
        for length in options.lengths:
            of_length = [row for row in rows if row["length"] == length]
            used, best = of_length[0], sorted(of_length, key=lambda row: row["median_ms"])[:3]
            names = ("rows", "keys", "warps", "stages", "registers")
            text = "  ".join(f"{row['median_ms']:.3f} {[row[name] for name in names]}" for row in (used, *best))
            print(f"{used['shape']:9} {used['gates']} {used['kernel']:18} {length:6}  {text}", flush=True)

    for gates, shape in itertools.product(options.gates, options.shapes):
        search(shape, options, gates == "soft", add)


if __name__ == "__main__":
    main()
