"""How fast entmax attention over all keys is in its kernels, beside torch's dense attention: one run, one JSON.

    python benchmarks/entmax_kernels.py --output entmax_kernels.json

    entmax exact        `entmax_attention` with neither edges nor tiles, alpha 1.5
    sdpa cudnn, flash   torch's dense causal attention

Queries and keys are drawn so that their support is about that of a converted SmolLM2-135M at 8,192 tokens: 55 keys per
query in the mean over heads, 21 in the median head. Every head has a scale that is searched until this holds; see
`make_inputs`. What came out is in the JSON: keys with weight per head, and the share of tiles of 64 x 64 that hold any.

First, outputs and gradients are compared with float64 at an odd length, at the same supports; without agreement nothing
is measured. The JSON is written after every row.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench, do_bench_cudagraph

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops.entmax import entmax_attention
from hf_sparse.ops.entmax.threshold import distribution

CHECKED = 1_531  # tokens of the comparison
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Keys with weight per query at 8,192 tokens, head by head: mean 55, median 21.
SUPPORTS = (10, 13, 16, 18, 21, 40, 75, 120, 180)
GROWTH = 0.2  # supports grow with this power of the length: 33, 40, 49 and 55 were measured from 1,024 to 8,192
TOPICS = 64
TOPIC, DRIFT, POPULAR, KEY_NOISE, QUERY_NOISE = 0.4, 0.7, 0.05, 0.7, 0.1
SAMPLED = 128  # queries from which a support is measured
CONTENDERS = ("entmax exact", "sdpa flash", "sdpa cudnn")


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
    return tensors, _searched(tensors[0].float(), tensors[1].float(), goal, generator)


def sampled_weights(query: Tensor, key: Tensor, scaling: Tensor, position: Tensor) -> Tensor:
    """Return the entmax weights of the queries at some positions, `[B, Hq, R, Tk]`."""
    group = query.shape[1] // key.shape[1]
    z = query[:, :, position] @ key.repeat_interleave(group, 1).transpose(-1, -2) * (scaling * 0.5)[:, None, None]
    seen = torch.arange(key.shape[2], device=key.device) <= position[:, None]
    return distribution(z.masked_fill_(~seen, -torch.inf), 2.0)


def _searched(query: Tensor, key: Tensor, goal: Tensor, generator: torch.Generator) -> Tensor:
    """Return scales at which the supports of the last half of the text have the wanted mean, by bisection."""
    length = key.shape[2]
    position = torch.randint(length // 2, length, (SAMPLED,), generator=generator, device=key.device)
    low, high = torch.full_like(goal, 1e-3), torch.full_like(goal, 10.0)
    for _ in range(14):
        middle = (low * high).sqrt()
        support = (sampled_weights(query, key, middle, position) > 0).sum(-1).float().mean((0, 2))
        low, high = torch.where(support > goal, middle, low), torch.where(support > goal, high, middle)
    return (low * high).sqrt()


def statistics_of(query: Tensor, key: Tensor, scaling: Tensor) -> dict[str, Any]:
    """Return what the supports are like: keys per query of every head, and shares of tiles with any."""
    length = key.shape[2]
    blocks = torch.linspace(0, length // 64 - 1, 24, device=key.device).long()
    position = (blocks[:, None] * 64 + torch.arange(64, device=key.device)).flatten()
    some = torch.cat([
        sampled_weights(query.float(), key.float(), scaling, part) > 0 for part in position.split(128)
    ], 2)[..., : length // 64 * 64]  # fmt: skip
    keys = some.sum(-1).float().mean((0, 2))
    tiles = some.unflatten(-1, (-1, 64)).any(-1).unflatten(2, (-1, 64)).any(3).float().sum((-1, -2))
    per_row = some.unflatten(-1, (-1, 64)).any(-1)
    rows = per_row.float().sum((-1, -2))
    sixteen = per_row.unflatten(2, (-1, 16)).any(3).float().sum((-1, -2))
    pairs = float((blocks + 1).sum())
    return {
        "keys_per_query": [round(float(number), 1) for number in keys],
        "tiles_64_64": round(float(tiles.mean()) / pairs, 4),
        "tiles_16_64": round(float(sixteen.mean()) / pairs / 4, 4),
        "tiles_1_64": round(float(rows.mean()) / pairs / 64, 4),
    }


def contender(name: str, inputs: list[Tensor], scaling: Tensor) -> Callable[[], Tensor]:
    """Return what computes an output."""
    query, key, value = inputs
    if name == "entmax exact":
        return partial(entmax_attention, query, key, value, alpha=1.5, scaling=scaling, causal=True)
    backend = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}[name]

    def dense() -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return dense


def measure(options: argparse.Namespace, name: str, inputs: list[Tensor], scaling: Tensor) -> list[dict[str, Any]]:
    """Return rows of a contender: forward, and forward with backward."""
    rows: list[dict[str, Any]] = []
    length = inputs[0].shape[2]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    run = contender(name, leaves, scaling)

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
            # In a CUDA graph, without the CPU that launches the kernels.
            rows.append(row | {"captured_ms": do_bench_cudagraph(function, rep=options.repeat_ms)})
    except (RuntimeError, NotImplementedError) as error:  # a kernel of torch that does not take the shape, or no memory
        rows.append({"contender": name, "length": length, "error": str(error).splitlines()[0]})
    return rows


def outcome(inputs: list[Tensor], scaling: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, scaling)]
    output = entmax_attention(*leaves[:3], alpha=1.5, scaling=leaves[3], causal=True)
    weights = torch.linspace(-1, 1, output[0, 0].numel(), device=output.device).sin().view(output.shape[2:])
    found = (output, *torch.autograd.grad((output.double() * weights.double()).sum(), leaves))
    return [tensor.detach().double() for tensor in found]


def check(options: argparse.Namespace) -> dict[str, float]:
    """Return relative errors `|ours - float64| / |float64|`; exit where rounding does not explain one."""
    dtype = getattr(torch, options.dtype)
    inputs, scaling = make_inputs(options, CHECKED, dtype)
    ours = outcome(inputs, scaling)
    exact = outcome([tensor.double() for tensor in inputs], scaling.double())
    names = ("output", "d_query", "d_key", "d_value", "d_scaling")
    errors = {name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, ours, exact, strict=True)}
    if not all(error <= ALLOWED[dtype] for error in errors.values()):
        sys.exit(f"nothing measured: errors {errors}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--query-heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders to measure")
    parser.add_argument("--repeat-ms", type=int, default=200, help="how long each is repeated")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, help="the JSON to write")
    options = parser.parse_args()

    names = ("batch", "query_heads", "kv_heads", "dim", "dtype", "repeat_ms")
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "entmax_kernels",
        "settings": {name: getattr(options, name) for name in names} | {"supports": SUPPORTS, "alpha": 1.5},
        "commit": options.commit,
        **describe(),
    }
    result["versions"] |= {"cuda": torch.version.cuda, "triton": version("triton")}
    result["errors_against_float64"] = check(options)
    print("errors:", {name: f"{error:.1e}" for name, error in result["errors_against_float64"].items()}, flush=True)
    result |= {"supports": {}, "rows": []}
    for length in sorted(options.lengths):
        inputs, scaling = make_inputs(options, length, getattr(torch, options.dtype))
        result["supports"][str(length)] = statistics_of(inputs[0], inputs[1], scaling)
        print(f"{length:7}  {result['supports'][str(length)]}", flush=True)
        for name in options.only or CONTENDERS:
            rows = measure(options, name, inputs, scaling)
            result["rows"] += rows
            for row in rows:
                told = (
                    row.get("error")
                    or f"{row['pass']:16} {row['median_ms']:9.3f} ms, {row['captured_ms']:9.3f} captured"
                )
                print(f"{length:7}  {name:13}  {told}", flush=True)
            if options.output:
                write_json(options.output, result)


if __name__ == "__main__":
    main()
