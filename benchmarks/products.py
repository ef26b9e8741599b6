"""How fast products of one input are in one kernel, and by cuBLAS one by one, in decoding steps of a few rows.

    python benchmarks/products.py --output products.json
    python benchmarks/products.py --shapes llama-8b --search --output products-sizes.json

Of each shape of `benchmarks/generate.py` four products of a layer are measured: `qkv` of queries, keys and values,
`output`, `gate up` and `down`. Microseconds are those of one layer, from a CUDA graph that goes over the weights of so
many layers that the L2 cache of the GPU holds few of them, as in a step. The share is the time in which the weights are
read once, at the bandwidth of a large copy in the same run, over the time that the products took.

With `--search` sizes of programs from a grid are measured too, the ones in use first. What runs is chosen by the rule
in `hf_sparse/ops/triton/products.py`, and whether it runs by that in `hf_sparse/ops/products.py`.

First, every size is compared with float64; one that differs by more than its rounding ends the run. The JSON is written
after every cell, the products of the 8B shape first.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from llamas import SHAPES, TINY  # beside this file
from measuring import copy_bandwidth, current_commit
from torch import Tensor

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops.products import is_faster
from hf_sparse.ops.triton.launch import compile_ahead
from hf_sparse.ops.triton.products import ProductSizes, fused_products, sizes_of

PRODUCTS = ("qkv", "output", "gate up", "down")
ALLOWED = 2.0  # times the rounding of the dtype, by which a product may differ from that in float64
MOST_SHARED = 110 << 10  # bytes of shared memory that a size of the grid may need: two programs fit then
REPLAYS = 12


def weights_of(shape: str, product: str, options: argparse.Namespace) -> tuple[int, list[int]]:
    """Return the columns of the weights, and the rows of each."""
    config = SHAPES[shape] | (TINY if options.tiny else {})
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    columns = mlp if product == "down" else hidden
    counts = {"qkv": [hidden, keys, keys], "output": [hidden], "gate up": [mlp, mlp], "down": [hidden]}
    return columns, counts[product]


def grid(rows: int, options: argparse.Namespace) -> list[ProductSizes]:
    """Return the sizes to try: by tensor cores, and for one row without them too."""
    blocks = [(16, 4, 4), (8, 8, 4), (32, 2, 4), (64, 1, 4), (32, 4, 8), (16, 8, 8), (16, 2, 2), (16, 1, 1), (16, 1, 2)]
    by_cores = itertools.product(blocks, (64, 128, 256), (3, 4, 6))
    sizes = [ProductSizes(outputs, columns, parts, warps, n) for (outputs, parts, warps), columns, n in by_cores]
    read = 8 if rows <= 8 else 16
    sizes = [one for one in sizes if 2 * one.stages * one.parts * (one.outputs + read) * one.columns <= MOST_SHARED]
    if rows == 1:
        without = itertools.product((4, 8, 16), (512, 1024), (0,), (4, 8), (1, 3, 5))
        sizes += [ProductSizes(*one) for one in without]
    return sizes[::12] if options.tiny else sizes


def compile_sizes(x: Tensor, weight: Tensor, sizes: list[ProductSizes]) -> None:
    """Compile the kernel with all sizes, side by side; it serves every number of weights and rows of them."""

    def all_sizes(x: Tensor, weight: Tensor) -> Tensor:
        for one in sizes:
            fused_products(x[0, 0], [weight[0, 0]], [], one)
        return x

    compile_ahead(all_sizes, x[None, None], weight[None, None], family=(len(x), *sizes))


def errors(
    x: Tensor, weights: list[Tensor], sizes: list[ProductSizes], dtype: torch.dtype
) -> dict[ProductSizes | None, float]:
    """Return the relative difference from float64, in roundings, of cuBLAS (`None`) and of every size that runs.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    exact = torch.cat([x.double() @ weight.double().T for weight in weights], -1)
    differences: dict[ProductSizes | None, float] = {}
    for one in (None, *sizes):
        try:
            found = [F.linear(x, w) for w in weights] if one is None else fused_products(x, weights, [], one)
        except Exception as error:  # too much shared memory, or what this version of the compiler cannot do
            if one in (None, sizes[0]):  # which is in use
                raise
            print(f"  {one}: {type(error).__name__}", flush=True)
            continue
        difference = (torch.cat(found, -1).double() - exact).norm() / exact.norm()
        differences[one] = float(difference) / torch.finfo(dtype).eps
        if not differences[one] <= ALLOWED:
            sys.exit(f"{one or 'cuBLAS'} differs by {differences[one]} roundings: nothing measured")
    return differences


def microseconds(run: Callable[[], object], layers: int, options: argparse.Namespace) -> float:
    """Return the median time of a layer, of a run over the weights of all."""
    if options.device != "cuda":
        run()
        return 1.0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return 1e3 * statistics.median(times) / layers


def measure(shape: str, product: str, rows: int, bandwidth: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of the JSON for one product."""
    columns, counts = weights_of(shape, product, options)
    dtype = getattr(torch, options.dtype)
    draw = partial(torch.randn, device=options.device, dtype=dtype)
    read = dtype.itemsize * columns * sum(counts)  # bytes
    layers = 2 if options.tiny else max(4, min(128, options.megabytes * 1_000_000 // read))
    x, models = draw(rows, columns), [[draw(count, columns) for count in counts] for _ in range(layers)]
    used = sizes_of(rows, columns, sum(counts))
    sizes = [used, *(one for one in grid(rows, options) if one != used)] if options.search else [used]
    if options.device == "cuda":
        compile_sizes(x, models[0][0], sizes)
    differences = errors(x, models[0], sizes, dtype)

    def run(one: ProductSizes | None) -> None:
        for weights in models:
            if one is None:
                for weight in weights:
                    F.linear(x, weight)
            else:
                fused_products(x, weights, [], one)

    times = {one: microseconds(partial(run, one), layers, options) for one in differences}
    searched = sorted((time, one) for one, time in times.items() if one is not None)
    share = {one: 1e6 * read / bandwidth / time for one, time in times.items()}
    return {
        "shape": shape, "product": product, "rows": rows, "columns": columns, "outputs": counts, "layers": layers,
        "chosen": is_faster(x, models[0]), "cublas_us": times[None], "cublas_share": share[None],
        "sizes": list(used), "kernel_us": times[used], "kernel_share": share[used],
        "roundings": max(differences.values()),
        "search": [{**one._asdict(), "us": time, "share": share[one]} for time, one in searched],
    }  # fmt: skip


def show_best(measured: list[dict[str, Any]]) -> None:
    """Print, for each number of rows, which sizes cost least against the fastest ones of every product."""
    for number in sorted({row["rows"] for row in measured}):
        ratios: dict[tuple[Any, ...], list[float]] = {}
        of_number = [row for row in measured if row["rows"] == number]
        for row in of_number:
            for one in row["search"]:
                sizes = tuple(one[name] for name in ProductSizes._fields)
                ratios.setdefault(sizes, []).append(one["us"] / row["search"][0]["us"])
        everywhere = {sizes: statistics.mean(some) for sizes, some in ratios.items() if len(some) == len(of_number)}
        best = sorted(everywhere.items(), key=lambda item: item[1])[:5]
        print(f"x {number:2}: " + "  ".join(f"{list(sizes)} {ratio:.3f}" for sizes, ratio in best), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["llama-8b", "tinyllama", "smollm2"])
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16], help="of the input: texts of a batch")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--megabytes", type=int, default=1000, help="read this much of weights in a graph")
    parser.add_argument("--search", action="store_true", help="try sizes of programs")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a trial; in Triton's interpreter too")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no cell begins")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    clock = time.monotonic()
    bandwidth = copy_bandwidth(options.device)
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "products",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in ("dtype", "megabytes", "search", "tiny", "device")},
        "bandwidth": bandwidth,
        **describe(),
        "rows": [],
    }
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    for shape, product, rows in itertools.product(options.shapes, options.products, options.rows):
        if time.monotonic() - clock > options.deadline:
            print("out of time", flush=True)
            break
        row = measure(shape, product, rows, bandwidth, options)
        result["rows"].append(row)
        write_json(options.output, result)
        best = "  ".join(f"{one['us']:.1f} {[*one.values()][:5]}" for one in row["search"][:3])
        told = "  ".join(
            f"{name} {row[f'{name}_us']:.1f} us {row[f'{name}_share']:.0%}" for name in ("cublas", "kernel")
        )
        print(f"{time.monotonic() - clock:5.0f} s  {shape:9} {product:7} x {rows:2}  {told}  best {best}", flush=True)
    if options.search:
        print(f"mean ratio of {', '.join(ProductSizes._fields)} to the fastest, of the products that the kernel takes")
        show_best([row for row in result["rows"] if row["chosen"] or options.tiny])


if __name__ == "__main__":
    main()
