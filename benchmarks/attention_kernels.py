"""How fast the attention kernels are, beside those of torch at the same shape: one run, one JSON.

    python benchmarks/attention_kernels.py --output kernels.json

    sparsek hard        selection included, gradients of query, key and value
    sparsek soft        gates over `--support` keys, gradient of the scores only: the training step of a scorer
    scan hard, soft     the selection alone, as it is part of the two
    flex window         FlexAttention with a window of k + window + sinks: as many keys per query, and no selection
    sdpa cudnn, flash   torch's dense causal attention

First, on a small odd size, outputs and gradients are compared with float64, and the selection with the one in plain
PyTorch; without agreement nothing is measured. The JSON is written after every row. A run that finds a JSON of the
same commit, machine and settings goes on where that one stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measuring import current_commit, milliseconds  # beside this file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.selection import thresholds

BLOCK = 128  # of FlexAttention's mask; lengths are multiples of it
CHECKED = 1_531  # tokens of the comparison
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CUDA = ("sparsek hard", "sparsek soft", "scan hard", "scan soft", "flex window", "sdpa cudnn", "sdpa flash")
CPU = ("sparsek hard", "sparsek soft", "scan hard", "scan soft", "sdpa")


def make_inputs(options: argparse.Namespace, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and scores."""
    generator = torch.Generator(options.device).manual_seed(length)
    draw = partial(torch.randn, generator=generator, device=options.device)
    heads = (options.query_heads, options.kv_heads, options.kv_heads)
    tensors = [draw(options.batch, number, length, options.dim).to(dtype) for number in heads]
    return [*tensors, draw(options.batch, options.kv_heads, length)]


def attend(
    options: argparse.Namespace, inputs: list[Tensor], gates: Any, k: int, window: int, support: int, **choice: Any
) -> Tensor:
    limit = support if gates == "soft" else None
    return sparsek_attention(*inputs, k=k, window=window, sinks=options.sinks, gates=gates, support=limit, **choice)


def select(options: argparse.Namespace, scores: Tensor, gates: str) -> Tensor:
    """The selection alone: the thresholds of soft gates, which are differentiable, or the intervals of hard ones."""
    queries, window, k = scores.shape[-1], options.window, options.k
    if gates == "soft":
        tau = scan_with_tau(options.device, scores, k, size=options.support, queries=queries, window=window).tau
        assert tau is not None
        return tau
    return intervals(options.device, scores, k, window)


def intervals(device: str, scores: Tensor, k: int, window: int) -> Tensor:
    """The first position that does not see each key, with hard gates."""
    keys = scores.shape[-1]
    if device == "cpu":
        found = thresholds.scan_prefixes(scores, k, size=k, queries=keys, window=window, with_lists=True)
        end = torch.searchsorted(found.floor, found.rank, right=True).masked_fill(found.rank == 0, 0)
        return torch.maximum(end, torch.arange(keys, device=scores.device) + window).int()
    from hf_sparse.ops.selection.triton.scan import select_keys

    return select_keys(scores, k, queries=keys, window=window).until


def scan_with_tau(device: str, scores: Tensor, k: int, **arguments: Any) -> thresholds.Scan:
    if device == "cpu":
        return thresholds.scan_prefixes(scores, k, with_tau=True, with_lists=True, **arguments)
    from hf_sparse.ops.selection.triton.scan import scan_prefixes

    return scan_prefixes(scores, k, with_lists=True, **arguments)


def window_mask(length: int, window: int, device: str) -> BlockMask:
    """The mask of a causal window, without a table of length times length."""

    def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    index = torch.arange(length // BLOCK, device=device)
    middle = (index[:, None] - index) * BLOCK
    near, far = middle - (BLOCK - 1), middle + (BLOCK - 1)  # smallest and largest distance of two blocks' tokens
    full = (near >= 0) & (far < window)
    partly = (far >= 0) & (near < window) & ~full
    tables = []
    for blocks in (partly, full):
        tables.append(blocks.sum(-1, dtype=torch.int32)[None, None])
        order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
        tables.append(order.to(torch.int32)[None, None])
    some, some_index, all_of, all_index = tables
    return BlockMask.from_kv_blocks(some, some_index, all_of, all_index, BLOCK_SIZE=BLOCK, mask_mod=inside)


def contender(
    options: argparse.Namespace, name: str, inputs: list[Tensor]
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """What computes an output, and the tensors that want a gradient."""
    query, key, value, scores = inputs
    kind, _, variant = name.partition(" ")
    if kind == "sparsek":
        choice = {"implementation": options.implementation}
        budget = (options.k, options.window, options.support)
        wanted = [scores] if variant == "soft" else [query, key, value]
        return partial(attend, options, inputs, variant, *budget, **choice), wanted
    if kind == "scan":
        return partial(select, options, scores, variant), [scores] if variant == "soft" else []
    if kind == "flex":
        mask = window_mask(query.shape[2], options.k + options.window + options.sinks, options.device)
        flex: Any = torch.compile(flex_attention, dynamic=False)
        return partial(flex, query, key, value, block_mask=mask, enable_gqa=True), [query, key, value]
    backends = {"cudnn": [SDPBackend.CUDNN_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}

    def dense() -> Tensor:
        with sdpa_kernel(backends.get(variant, [SDPBackend.MATH])):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return dense, [query, key, value]


def measure(options: argparse.Namespace, name: str, length: int) -> list[dict[str, Any]]:
    """Rows of a contender at a length: forward, and forward with backward where there is a gradient."""
    rows = []
    try:
        inputs = make_inputs(options, length, getattr(torch, options.dtype))
        run, wanted = contender(options, name, inputs)

        def forward() -> Tensor:
            with torch.no_grad():
                return run()

        begin = time.perf_counter()
        forward()
        row: dict[str, Any] = {"contender": name, "length": length, "pass": "forward"}
        row["first_call_s"] = time.perf_counter() - begin  # compiles, in the first row of a kernel
        rows.append(row | milliseconds(forward, options.device, options.repeat_ms))
        if wanted:
            for tensor in wanted:
                tensor.requires_grad_()
            upstream = torch.randn_like(forward())

            def both() -> tuple[Tensor, ...]:
                return torch.autograd.grad(run(), wanted, upstream)

            begin = time.perf_counter()
            both()
            row = {"contender": name, "length": length, "pass": "forward_backward"}
            row["first_call_s"] = time.perf_counter() - begin
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                both()
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
            rows.append(row | milliseconds(both, options.device, options.repeat_ms))
    except (RuntimeError, NotImplementedError) as error:  # a kernel of torch that does not take the shape, or no memory
        rows.append({"contender": name, "length": length, "error": str(error).splitlines()[0]})
    return rows


def outcome(
    options: argparse.Namespace, inputs: list[Tensor], gates: str, implementation: str
) -> list[tuple[str, Tensor]]:
    """Output and gradients at a small budget, float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = attend(options, leaves, gates, 48, 61, 200, implementation=implementation)
    wanted = leaves if gates == "soft" else leaves[:3]
    weights = torch.linspace(-1, 1, output[0, 0].numel(), device=output.device).sin().view(output.shape[2:])
    gradients = torch.autograd.grad((output.double() * weights.double()).sum(), wanted)
    names = ("output", "d_query", "d_key", "d_value", "d_scores")
    return [(name, tensor.detach().double()) for name, tensor in zip(names, (output, *gradients), strict=False)]


def check(options: argparse.Namespace) -> dict[str, float]:
    """Relative errors `|ours - float64| / |float64|`, of outputs, gradients and thresholds.

    Raises:
        SystemExit: an error that rounding does not explain, or another selection than that of plain PyTorch.
    """
    dtype = getattr(torch, options.dtype)
    inputs = make_inputs(options, CHECKED, dtype)
    errors = {}
    for gates in ("hard", "soft"):
        exact = [*(tensor.double() for tensor in inputs[:3]), inputs[3]]
        # The scores stay float32, so that both have the same ties.
        for (name, ours), (_, theirs) in zip(
            outcome(options, inputs, gates, options.implementation),
            outcome(options, exact, gates, "dense"),
            strict=True,
        ):
            errors[f"{gates} {name}"] = float((ours - theirs).norm() / theirs.norm())
    arguments: dict[str, Any] = {"size": 200, "queries": CHECKED, "window": 61}
    found, expected = (scan_with_tau(device, inputs[3], 48, **arguments) for device in (options.device, "cpu"))
    assert found.tau is not None and expected.tau is not None
    # As places in the order of all keys: ranks may be any integers.
    places = [torch.searchsorted(one.rank.sort(-1).values, one.floor) for one in (found, expected)]
    same = torch.equal(places[0], places[1]) and torch.equal(found.lists.long(), expected.lists)
    some = expected.tau.isfinite()
    same = same and torch.equal(some, found.tau.isfinite())
    same = same and torch.equal(*(intervals(device, inputs[3], 48, 61) for device in (options.device, "cpu")))
    errors["tau"] = float((found.tau - expected.tau)[some].norm() / expected.tau[some].norm())
    limits = {name: 1e-6 if name == "tau" else ALLOWED[dtype] for name in errors}
    if not same or not all(error <= limits[name] for name, error in errors.items()):
        sys.exit(f"nothing measured: the selections are {'the same' if same else 'different'}, errors {errors}")
    return errors


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """A result without rows, or the one that an earlier run left unfinished."""
    names = ("batch", "query_heads", "kv_heads", "dim", "k", "window", "sinks", "support", "device", "dtype")
    settings = {name: getattr(options, name) for name in (*names, "implementation", "repeat_ms")}
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "kernels",
        "settings": settings,
        "commit": options.commit or current_commit(),
        **describe(),
    }
    result["versions"]["cuda"] = torch.version.cuda
    try:
        result["versions"]["triton"] = version("triton")
    except PackageNotFoundError:
        result["versions"]["triton"] = None
    if options.output and options.output.exists():
        earlier = json.loads(options.output.read_text("utf-8"))
        if all(earlier.get(name) == content for name, content in result.items()):
            return earlier
    return result | {"errors_against_float64": {}, "rows": []}


def show(result: dict[str, Any]) -> None:
    """Medians in milliseconds, forward / forward with backward, a line per contender."""
    medians: dict[str, dict[tuple[int, str], float]] = {}
    for row in result["rows"]:
        cells = medians.setdefault(row["contender"], {})
        if "error" not in row:
            cells[row["length"], row["pass"]] = row["median_ms"]
    lengths = sorted({row["length"] for row in result["rows"]})
    print(f"{'ms':13}" + "".join(f"{length:>19,}" for length in lengths))
    for name, cells in medians.items():
        line = f"{name:13}"
        for length in lengths:
            pair = [cells.get((length, which)) for which in ("forward", "forward_backward")]
            line += f"{' / '.join('-' if ms is None else f'{ms:.3f}' for ms in pair):>19}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--support", type=int, default=2048, help="keys that soft gates may spread over")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", help="bfloat16 on a GPU and float32 elsewhere, unless given")
    parser.add_argument("--implementation", default="auto", choices=["auto", "triton", "tiled"])
    parser.add_argument("--only", nargs="+", choices=sorted({*CUDA, *CPU}), help="contenders to measure")
    parser.add_argument("--repeat-ms", type=int, default=200, help="how long each is repeated")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, help="the JSON to write, and to go on with")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.device == "cpu" and (options.k, options.window, options.support) == (512, 512, 2048):
        options.k, options.window, options.support = 32, 32, 128  # so that short lengths are sparse
    if any(length % BLOCK for length in options.lengths):
        parser.error(f"lengths must be multiples of {BLOCK}")
    # Every length has other constants, and is compiled once.
    torch._dynamo.config.cache_size_limit = 4 * len(options.lengths)

    result = begin(options)
    if not result["errors_against_float64"]:
        result["errors_against_float64"] = check(options)
    print("errors:", {name: f"{error:.1e}" for name, error in result["errors_against_float64"].items()}, flush=True)
    measured = {(row["contender"], row["length"]) for row in result["rows"]}
    for length in sorted(options.lengths):
        for name in options.only or (CUDA if options.device == "cuda" else CPU):
            if (name, length) in measured:
                continue
            rows = measure(options, name, length)
            result["rows"] += rows
            for row in rows:
                told = row.get("error") or f"{row['pass']:16} {row['median_ms']:10.3f} ms"
                print(f"{length:7}  {name:13}  {told}", flush=True)
            if options.output:
                write_json(options.output, result)
    show(result)


if __name__ == "__main__":
    main()
