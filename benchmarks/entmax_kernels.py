"""How fast entmax attention over all keys is in its kernels, beside AdaSplash and torch's dense attention.

    python benchmarks/entmax_kernels.py --output entmax_kernels.json
    python benchmarks/entmax_kernels.py --bidirectional --batch 8 --query-heads 12 --kv-heads 12 \\
        --lengths 512 1024 2048 4096 8192 --output entmax_bidirectional.json

    entmax exact        `entmax_attention` with neither edges nor tiles
    adasplash 1, 2      entmax of the package `adasplash`, where it is installed (`adasplash_contender.py`)
    sdpa cudnn, flash   torch's dense attention

One run writes one JSON.

Queries and keys are drawn so that their support is about that of a converted SmolLM2-135M at 8,192 tokens: 55 keys per
query in the mean over heads, 21 in the median head. Every head has a scale that is searched until this holds for the
second half of the text (over all of it there are about 44), see `make_inputs`.
What came out is in the JSON: keys with weight per head, and the share of tiles of 64 x 64 that hold any.

First, outputs and gradients are compared with float64 at an odd length, at the same supports; without agreement nothing
is measured. Errors of AdaSplash are written down as well, at 4,096 tokens, since it takes powers of two only. The JSON
is written after every row.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adasplash_contender as ada  # beside this file
import torch
from measuring import current_commit  # beside this file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench, do_bench_cudagraph

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops.entmax import entmax_attention
from hf_sparse.ops.entmax.threshold import distribution

CHECKED = 1_531  # tokens of the comparison
CHECKED_OTHERS = 4_096  # of that of AdaSplash, which takes powers of two
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Keys with weight per query at 8,192 tokens, head by head: mean 55, median 21.
SUPPORTS = (10, 13, 16, 18, 21, 40, 75, 120, 180)
GROWTH = 0.2  # supports grow with this power of the length: 33, 40, 49 and 55 were measured from 1,024 to 8,192
TOPICS = 64
TOPIC, DRIFT, POPULAR, KEY_NOISE, QUERY_NOISE = 0.4, 0.7, 0.05, 0.7, 0.1
SAMPLED = 128  # queries from which a support is measured
CONTENDERS = ("entmax exact", *ada.VERSIONS, "sdpa flash", "sdpa cudnn")


def make_inputs(options: argparse.Namespace, length: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value, and the scale of every query head.

    A text is a sequence of segments of 64 tokens, each of one of 64 topics, with a drift (autoregressive, 0.97) and
    noise on top. Keys show what their tokens are about, queries too, so that they find the same drift near by and the
    same topic far away. All queries have a direction in common; the first key lies in it, and every key does somewhat
    (exponentially distributed), so that some keys are sought by all.
    """
    generator = torch.Generator(options.device).manual_seed(length)
    draw = partial(torch.randn, generator=generator, device=options.device)
    batch, heads, dim = options.batch, options.kv_heads, options.dim
    topic = torch.randint(TOPICS, (batch, heads, -(-length // 64)), generator=generator, device=options.device)
    centers = draw(batch, heads, TOPICS, dim)
    content = centers.gather(2, topic[..., None].expand(-1, -1, -1, dim)).repeat_interleave(64, 2)[:, :, :length]
    # A sum of exponentially fading noise: the filter is as long as what it forgets.
    kernel = 0.97 ** torch.arange(255, -1, -1, device=options.device, dtype=torch.float32)
    noise = draw(batch * heads * dim, 1, length + 255)
    drift = torch.nn.functional.conv1d(noise, kernel[None, None] * (1 - 0.97**2) ** 0.5)
    content = TOPIC * content + DRIFT * drift.view(batch, heads, dim, length).transpose(2, 3)
    sought = torch.nn.functional.normalize(draw(batch, heads, 1, dim), dim=-1) * dim**0.5
    popular = -torch.rand(batch, heads, length, 1, generator=generator, device=options.device).clamp(min=1e-9).log()
    key = content + KEY_NOISE * draw(batch, heads, length, dim) + POPULAR * popular * sought
    key[:, :, :1] = 1.5 * sought
    group = options.query_heads // heads
    query = content.repeat_interleave(group, 1) + sought.repeat_interleave(group, 1)
    query = query + QUERY_NOISE * draw(batch, options.query_heads, length, dim)
    value = draw(batch, heads, length, dim)
    tensors = [tensor.to(dtype) for tensor in (query, key, value)]
    goal = torch.tensor(SUPPORTS, device=options.device) * (length / 8192) ** GROWTH
    goal = goal.repeat(-(-options.query_heads // len(SUPPORTS)))[: options.query_heads]
    return tensors, _searched(options, tensors[0].float(), tensors[1].float(), goal, generator)


def sampled_weights(
    query: Tensor, key: Tensor, scaling: Tensor, position: Tensor, alpha: float = 1.5, causal: bool = True
) -> Tensor:
    """Return the entmax weights of the queries at some positions, `[B, Hq, R, Tk]`."""
    group = query.shape[1] // key.shape[1]
    scaled = scaling * (alpha - 1)
    z = query[:, :, position] @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaled[:, None, None]
    if causal:
        z.masked_fill_(torch.arange(key.shape[2], device=key.device) > position[:, None], -torch.inf)
    return distribution(z, 1 / (alpha - 1))


def _searched(
    options: argparse.Namespace, query: Tensor, key: Tensor, goal: Tensor, generator: torch.Generator
) -> Tensor:
    """Return scales at which the supports of the last half of the text have the wanted mean, by bisection."""
    length = key.shape[2]
    position = torch.randint(length // 2, length, (SAMPLED,), generator=generator, device=key.device)
    low, high = torch.full_like(goal, 1e-3), torch.full_like(goal, 10.0)
    for _ in range(14):
        middle = (low * high).sqrt()
        weights = sampled_weights(query, key, middle, position, options.alpha, not options.bidirectional)
        support = (weights > 0).sum(-1).float().mean((0, 2))
        low, high = torch.where(support > goal, middle, low), torch.where(support > goal, high, middle)
    return (low * high).sqrt()


def statistics_of(options: argparse.Namespace, query: Tensor, key: Tensor, scaling: Tensor) -> dict[str, Any]:
    """Return what the supports are like: keys per query of every head, and shares of tiles with any."""
    length = key.shape[2]
    blocks = torch.linspace(0, length // 64 - 1, 24, device=key.device).long()
    position = (blocks[:, None] * 64 + torch.arange(64, device=key.device)).flatten()
    some = torch.cat([
        sampled_weights(query.float(), key.float(), scaling, part, options.alpha, not options.bidirectional) > 0
        for part in position.split(128)
    ], 2)[..., : length // 64 * 64]  # fmt: skip
    keys = some.sum(-1).float().mean((0, 2))
    tiles = some.unflatten(-1, (-1, 64)).any(-1).unflatten(2, (-1, 64)).any(3).float().sum((-1, -2))
    per_row = some.unflatten(-1, (-1, 64)).any(-1)
    rows = per_row.float().sum((-1, -2))
    sixteen = per_row.unflatten(2, (-1, 16)).any(3).float().sum((-1, -2))
    pairs = float(len(blocks) * (length // 64) if options.bidirectional else (blocks + 1).sum())
    return {
        "keys_per_query": [round(float(number), 1) for number in keys],
        "tiles_64_64": round(float(tiles.mean()) / pairs, 4),
        "tiles_16_64": round(float(sixteen.mean()) / pairs / 4, 4),
        "tiles_1_64": round(float(rows.mean()) / pairs / 64, 4),
    }


def contender(
    name: str, inputs: list[Tensor], scaling: Tensor, alpha: float = 1.5, causal: bool = True
) -> Callable[[], Tensor]:
    """Return what computes an output; AdaSplash takes what `adasplash_contender.prepared` returns."""
    query, key, value = inputs
    if name == "entmax exact":
        return partial(entmax_attention, query, key, value, alpha=alpha, scaling=scaling, causal=causal)
    if name in ada.VERSIONS:
        return ada.attend(name, inputs, alpha, causal)
    backend = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}[name]

    def dense() -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    return dense


def measure(options: argparse.Namespace, name: str, inputs: list[Tensor], scaling: Tensor) -> list[dict[str, Any]]:
    """Return rows of a contender: forward, and forward with backward."""
    rows: list[dict[str, Any]] = []
    length = inputs[0].shape[2]
    tensors = ada.prepared(name, inputs, scaling) if name in ada.VERSIONS else inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    run = contender(name, leaves, scaling, options.alpha, not options.bidirectional)

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), leaves, upstream)

    try:
        upstream = torch.randn_like(forward())
        for label, function in (("forward", forward), ("forward_backward", both)):
            function()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            function()
            peak = torch.cuda.max_memory_allocated() - held
            median, low, high = do_bench(function, warmup=25, rep=options.repeat_ms, quantiles=[0.5, 0.2, 0.8])
            row = {"contender": name, "length": length, "pass": label, "peak_bytes": peak}
            row |= {"median_ms": median, "p20_ms": low, "p80_ms": high}
            # In a CUDA graph, without the CPU that launches the kernels. AdaSplash 1 waits for the GPU in between.
            captured = None if name == "adasplash 1" else do_bench_cudagraph(function, rep=options.repeat_ms)
            rows.append(row | {"captured_ms": captured})
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # a shape that is not taken, or no memory
        rows.append({"contender": name, "length": length, "error": str(error).splitlines()[0]})
    return rows


def outcome(options: argparse.Namespace, name: str, inputs: list[Tensor], scaling: Tensor) -> list[Tensor]:
    """Return output and gradients of a contender, in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, scaling)]
    tensors = ada.prepared(name, leaves[:3], leaves[3]) if name in ada.VERSIONS else leaves[:3]
    output = contender(name, tensors, leaves[3], options.alpha, not options.bidirectional)()
    weights = torch.linspace(-1, 1, output[0, 0].numel(), device=output.device).sin().view(output.shape[2:])
    found = (output, *torch.autograd.grad((output.double() * weights.double()).sum(), leaves))
    return [tensor.detach().double() for tensor in found]


def errors_of(options: argparse.Namespace, name: str, length: int) -> dict[str, float]:
    """Return relative errors `|found - float64| / |float64|` of a contender."""
    inputs, scaling = make_inputs(options, length, getattr(torch, options.dtype))
    found = outcome(options, name, inputs, scaling)
    exact = outcome(options, "entmax exact", [tensor.double() for tensor in inputs], scaling.double())
    names = ("output", "d_query", "d_key", "d_value", "d_scaling")
    return {name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, found, exact, strict=True)}


def check(options: argparse.Namespace) -> dict[str, float]:
    """Return the errors of the exact mode; exit where rounding does not explain one."""
    errors = errors_of(options, "entmax exact", CHECKED)
    if not all(error <= ALLOWED[getattr(torch, options.dtype)] for error in errors.values()):
        sys.exit(f"nothing measured: errors {errors}")
    return errors


def check_others(options: argparse.Namespace, names: list[str]) -> dict[str, dict[str, float] | str]:
    """Return the errors of AdaSplash, or why it did not run. They decide nothing: its rows are told with them."""
    errors: dict[str, dict[str, float] | str] = {}
    for name in names:
        if name in ada.VERSIONS:
            try:
                errors[name] = errors_of(options, name, CHECKED_OTHERS)
            except (AssertionError, RuntimeError) as error:
                errors[name] = str(error).splitlines()[0]
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--query-heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--bidirectional", action="store_true", help="attention without a causal mask, as in encoders")
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders to measure")
    parser.add_argument("--repeat-ms", type=int, default=200, help="how long each is repeated")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, help="the JSON to write")
    options = parser.parse_args()

    contenders = options.only or [
        name
        for name in CONTENDERS
        if name not in ada.VERSIONS
        or (ada.installed_version() and ada.takes(name, options.alpha, not options.bidirectional))
    ]
    names = ("batch", "query_heads", "kv_heads", "dim", "dtype", "repeat_ms", "alpha", "bidirectional")
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "entmax_kernels",
        "settings": {name: getattr(options, name) for name in names} | {"supports": SUPPORTS},
        "commit": options.commit or current_commit(),
        **describe(),
    }
    result["versions"] |= {"cuda": torch.version.cuda, "triton": version("triton")}
    result["versions"] |= {"adasplash": ada.installed_version()}
    result["errors_against_float64"] = check(options)
    print("errors:", {name: f"{error:.1e}" for name, error in result["errors_against_float64"].items()}, flush=True)
    result["errors_of_others"] = check_others(options, contenders)
    print("errors of others:", result["errors_of_others"], flush=True)
    result |= {"supports": {}, "rows": []}
    for length in sorted(options.lengths):
        inputs, scaling = make_inputs(options, length, getattr(torch, options.dtype))
        result["supports"][str(length)] = statistics_of(options, inputs[0], inputs[1], scaling)
        print(f"{length:7}  {result['supports'][str(length)]}", flush=True)
        for name in contenders:
            rows = measure(options, name, inputs, scaling)
            result["rows"] += rows
            for row in rows:
                told = row.get("error") or (
                    f"{row['pass']:16} {row['median_ms']:9.3f} ms, {row['captured_ms'] or float('nan'):9.3f} captured"
                )
                print(f"{length:7}  {name:13}  {told}", flush=True)
            if options.output:
                write_json(options.output, result)


if __name__ == "__main__":
    main()
