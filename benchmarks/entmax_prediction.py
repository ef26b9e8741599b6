"""How fast entmax attention over predicted tiles is, prediction included, and how much attention the tiles hold.

    python benchmarks/entmax_prediction.py --output entmax_prediction.json [--inputs queries_and_keys.safetensors]

    predicted           `pooled_tiles`, and `entmax_attention` over its tiles
    flex tiles          softmax over the same tiles in FlexAttention; neither prediction nor its mask is included
    entmax exact        `entmax_attention` over all keys
    adasplash 1, 2      entmax over all keys of the package `adasplash`, where it is installed
    sdpa flash, cudnn   torch's dense causal attention

Queries and keys are those of `entmax_kernels.py`, which says how they are drawn, and those of a file: tensors
`NAME.query` `[1, Hq, T, D]`, `NAME.key` `[1, Hkv, T, D]` and `NAME.scaling` `[Hq]`, as the layers of a model had them;
values are drawn. Beside the time stand the share of the allowed pairs of tiles that is listed, and the mass that full
entmax gives to listed keys, over some queries of all parts of the text.

First, the lists of the kernels are compared with those of plain PyTorch, and outputs and gradients over them with
float64, at an odd length; without agreement nothing is measured. Errors of AdaSplash and FlexAttention are written
down too. Shorter texts come first, and AdaSplash after all others, since it searches for sizes of its own for minutes,
at every length anew. The JSON is written after every contender; after `--deadline` seconds no other one begins.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adasplash_contender as ada  # beside this file
import torch
from entmax_kernels import ALLOWED, CHECKED, check_others, contender, make_inputs, sampled_weights
from measuring import current_commit  # beside this file
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench, do_bench_cudagraph

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops.entmax import entmax_attention, pooled_tiles
from hf_sparse.ops.tiles import Tiles

WITH_TILES = ("predicted", "flex tiles")
CONTENDERS = (*WITH_TILES, "entmax exact", *ada.VERSIONS, "sdpa flash", "sdpa cudnn")
SAMPLED = 256  # queries over which the recall is measured
DIFFERENT = 0.01  # of the listed pairs of tiles may differ from those of float64: scores that are almost equal


def predict(options: argparse.Namespace, count: int, query: Tensor, key: Tensor, scaling: Tensor) -> Tiles:
    return pooled_tiles(
        query,
        key,
        size=options.tile,
        rows=options.query_tile,
        choices=count,
        pool=options.pool,
        scaling=scaling,
        causal=True,
        window=options.window,
    )


def attend(options: argparse.Namespace, count: int, inputs: list[Tensor], scaling: Tensor) -> Tensor:
    """Predict tiles, and attend over them."""
    query, key, value = inputs
    tiles = predict(options, count, query.detach(), key.detach(), scaling)
    return entmax_attention(query, key, value, alpha=1.5, scaling=scaling, causal=True, tiles=tiles)


def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Let a query see itself and older keys, for FlexAttention."""
    return query >= key


def flex(options: argparse.Namespace, count: int, inputs: list[Tensor], scaling: Tensor) -> Callable[[], Tensor]:
    """Return softmax over the predicted tiles in FlexAttention."""
    query, key, value = inputs
    tiles, length = predict(options, count, query.detach(), key.detach(), scaling), key.shape[2]
    listed = tiles.mask(-(-length // options.tile))
    # Only the tile of keys in which a query lies needs the causal mask.
    diagonal = torch.arange(listed.shape[2], device=key.device) * options.query_tile // options.tile
    masked = listed & (torch.arange(listed.shape[3], device=key.device) == diagonal[:, None])
    mask = BlockMask.from_kv_blocks(
        *_ordered(masked),
        *_ordered(listed & ~masked),
        BLOCK_SIZE=(options.query_tile, options.tile),
        mask_mod=seen,
        seq_lengths=(length, length),
    )
    # Programs must not be larger than the tiles, whatever size FlexAttention would choose.
    rows, size = options.query_tile, options.tile
    sizes = {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": size, "bwd_BLOCK_M1": min(rows, 32), "bwd_BLOCK_N1": size}
    sizes |= {"bwd_BLOCK_M2": rows, "bwd_BLOCK_N2": min(size, 32)}
    torch._dynamo.config.recompile_limit = 100  # every length is compiled on its own, with gradients and without
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, query, key, value, block_mask=mask, enable_gqa=True, kernel_options=sizes)


def _ordered(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of listed tiles of each row, and all tiles with the listed ones first."""
    return listed.sum(-1, dtype=torch.int32), listed.int().argsort(dim=-1, descending=True, stable=True).int()


def flex_error(options: argparse.Namespace, count: int) -> float | str:
    """Return the relative error of FlexAttention over the tiles, or why it did not run. It decides nothing."""
    inputs, scaling = make_inputs(options, 2048, getattr(torch, options.dtype))
    tiles = predict(options, count, inputs[0], inputs[1], scaling)
    listed = tiles.mask(2048 // options.tile).repeat_interleave(tiles.rows, 2).repeat_interleave(options.tile, 3)
    listed &= torch.ones(2048, 2048, dtype=torch.bool, device=listed.device).tril()
    query, key, value = (tensor.double() for tensor in inputs)
    exact = scaled_dot_product_attention(query, key, value, attn_mask=listed, enable_gqa=True)
    try:
        return float((flex(options, count, inputs, scaling)().double() - exact).norm() / exact.norm())
    except Exception as error:  # whatever the compiler raises
        return str(error).splitlines()[0]


def statistics_of(
    options: argparse.Namespace, count: int, query: Tensor, key: Tensor, scaling: Tensor
) -> dict[str, Any]:
    """Return what the predicted tiles hold: their share of the allowed pairs, and the mass, also per head."""
    tiles, length = predict(options, count, query, key, scaling), key.shape[2]
    allowed = torch.arange(tiles.index.shape[2], device=query.device) * tiles.rows // tiles.size + 1
    share = (tiles.index >= 0).sum((0, 2, 3)) / allowed.sum()
    total = -(-length // tiles.size)
    mass: list[Tensor] = []
    support: list[Tensor] = []
    for position in torch.linspace(0, length - 1, SAMPLED, device=query.device).long().split(32):
        weights = sampled_weights(query.float(), key.float(), scaling, position)[0]
        support.append((weights > 0).sum(-1).float())
        padded = torch.nn.functional.pad(weights, (0, total * tiles.size - length))
        listed = tiles.mask(total)[0][:, position // tiles.rows]
        mass.append((padded.unflatten(-1, (total, tiles.size)).sum(-1) * listed).sum(-1))
    per_head = torch.cat(mass, 1).mean(1)
    return {
        "listed": round(float(share.mean()), 4),
        "tiles_per_list": round(float(tiles.counts.float().mean()), 1),
        "recall": round(float(per_head.mean()), 4),
        "recall_per_head": [round(float(number), 4) for number in per_head],
        "keys_per_query": round(float(torch.cat(support, 1).mean()), 1),
    }


def check(options: argparse.Namespace) -> dict[str, float]:
    """Return the share of different pairs, and relative errors; exit where rounding does not explain one."""
    dtype = getattr(torch, options.dtype)
    inputs, scaling = make_inputs(options, CHECKED, dtype)
    query, key = inputs[:2]
    count = min(options.choices)
    tiles = predict(options, count, query, key, scaling)
    precise = predict(options, count, query.double(), key.double(), scaling.double())
    total = -(-CHECKED // options.tile)
    one, other = tiles.mask(total), precise.mask(total)
    errors = {"lists": float((one != other).sum() / other.sum())}

    def outcome(dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        wide = scaling.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        output = entmax_attention(*leaves, alpha=1.5, scaling=wide, causal=True, tiles=tiles)
        weights = torch.linspace(-1, 1, output[0, 0].numel(), device=output.device).sin().view(output.shape[2:])
        found = (output, *torch.autograd.grad((output.double() * weights.double()).sum(), [*leaves, wide]))
        return [tensor.detach().double() for tensor in found]

    names = ("output", "d_query", "d_key", "d_value", "d_scaling")
    for name, ours, exact in zip(names, outcome(dtype), outcome(torch.float64), strict=True):
        errors[name] = float((ours - exact).norm() / exact.norm())
    if errors["lists"] > DIFFERENT or not all(errors[name] <= ALLOWED[dtype] for name in names):
        sys.exit(f"nothing measured: errors {errors}")
    return errors


def measure(
    options: argparse.Namespace, name: str, count: int | None, inputs: list[Tensor], scaling: Tensor
) -> list[dict[str, Any]]:
    """Return rows of a contender: forward, and forward with backward; where tiles are predicted, prediction alone."""
    rows: list[dict[str, Any]] = []
    tensors = ada.prepared(name, inputs, scaling) if name in ada.VERSIONS else inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    run: Callable[[], Tensor]
    if count is None:
        run = contender(name, leaves, scaling)
    elif name == "flex tiles":
        run = flex(options, count, leaves, scaling)
    else:
        run = partial(attend, options, count, leaves, scaling)

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), leaves, upstream)

    functions: list[tuple[str, Callable[[], Any]]] = [("forward", forward), ("forward_backward", both)]
    if name == "predicted" and count is not None:
        query, key, _ = (leaf.detach() for leaf in leaves)
        functions.append(("prediction", partial(predict, options, count, query, key, scaling)))
    try:
        upstream = torch.randn_like(forward())
        for label, function in functions:
            function()
            median = do_bench(function, warmup=10, rep=options.repeat_ms, return_mode="median")
            # AdaSplash 1 waits for the GPU, which a CUDA graph cannot hold.
            captured = None if name == "adasplash 1" else do_bench_cudagraph(function, rep=options.repeat_ms)
            rows.append({"contender": name, "choices": count, "pass": label})
            rows[-1] |= {"median_ms": median, "captured_ms": captured}
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # a shape that is not taken, or no memory
        rows.append({"contender": name, "choices": count, "error": str(error).splitlines()[0]})
    return rows


def texts(options: argparse.Namespace) -> dict[str, Callable[[], tuple[list[Tensor], Tensor]]]:
    """Return what makes the inputs of each text, by its name: those of the file, the shortest first, and drawn ones."""
    dtype = getattr(torch, options.dtype)
    made: dict[str, Callable[[], tuple[list[Tensor], Tensor]]] = {}

    def read(tensors: dict[str, Tensor], name: str) -> tuple[list[Tensor], Tensor]:
        query, key, scaling = (tensors[f"{name}.{part}"].to(options.device) for part in ("query", "key", "scaling"))
        value = torch.randn(key.shape, device=key.device, generator=torch.Generator(key.device).manual_seed(0))
        return [query.to(dtype), key.to(dtype), value.to(dtype)], scaling.float()

    for path in options.inputs:
        tensors = load_file(path)
        names = {name.rsplit(".", 1)[0] for name in tensors}
        for name in sorted(names, key=lambda name: (tensors[f"{name}.query"].shape[2], name)):
            made[name] = partial(read, tensors, name)
    for length in sorted(options.lengths):
        made[f"drawn {length}"] = partial(make_inputs, options, length, dtype)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--inputs", type=Path, nargs="*", default=[], help="safetensors with queries and keys")
    parser.add_argument("--tile", type=int, default=64, help="keys per tile")
    parser.add_argument("--query-tile", type=int, help="queries per tile; --tile by default")
    parser.add_argument("--choices", type=int, nargs="+", default=[4, 8], help="tiles that each query chooses")
    parser.add_argument("--pool", type=int, default=16, help="keys whose mean stands for them")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--query-heads", type=int, default=9, help="number of heads of the drawn queries")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders to measure")
    parser.add_argument("--repeat-ms", type=int, default=50, help="how long each is repeated")
    parser.add_argument("--deadline", type=float, help="seconds from the start after which no other contender begins")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, help="the JSON to write")
    options = parser.parse_args()
    began = time.perf_counter()
    options.query_tile = options.query_tile or options.tile
    options.alpha, options.bidirectional = 1.5, False  # for make_inputs
    contenders = options.only or [n for n in CONTENDERS if n not in ada.VERSIONS or ada.installed_version()]

    names = ("tile", "query_tile", "choices", "pool", "window", "batch", "query_heads", "kv_heads", "dim")
    settings = {name: getattr(options, name) for name in (*names, "dtype", "repeat_ms")} | {"alpha": 1.5}
    result: dict[str, Any] = {"format": 1, "benchmark": "entmax_prediction", "settings": settings}
    result |= {"commit": options.commit or current_commit(), **describe()}
    result["versions"] |= {"cuda": torch.version.cuda, "triton": version("triton")}
    result["versions"] |= {"adasplash": ada.installed_version()}
    result["errors_against_float64"] = check(options)
    print("errors:", {name: f"{error:.1e}" for name, error in result["errors_against_float64"].items()}, flush=True)
    result |= {"errors_of_others": {}, "texts": {}, "rows": []}
    if "flex tiles" in contenders:
        result["flex_error"] = flex_error(options, min(options.choices))
        print("FlexAttention:", result["flex_error"], flush=True)
    others = [name for name in contenders if name in ada.VERSIONS]
    for names_of_round in ([name for name in contenders if name not in others], others):
        if names_of_round == others != [] and not is_late(options, began):
            result["errors_of_others"] = check_others(options, others)
            print("errors of others:", result["errors_of_others"], flush=True)
        for text, make in texts(options).items():
            if names_of_round and not is_late(options, began):
                measure_text(options, text, make, names_of_round, result, began)


def is_late(options: argparse.Namespace, began: float) -> bool:
    """Tell whether the deadline is over."""
    return options.deadline is not None and time.perf_counter() - began > options.deadline


def measure_text(
    options: argparse.Namespace,
    text: str,
    make: Callable[[], tuple[list[Tensor], Tensor]],
    contenders: list[str],
    result: dict[str, Any],
    began: float,
) -> None:
    """Measure some contenders on a text, and write the rows down after each."""
    inputs, scaling = make()
    if text not in result["texts"]:
        (heads, length, dim), kv_heads = inputs[0].shape[1:], inputs[1].shape[1]
        shape = {"length": length, "query_heads": heads, "kv_heads": kv_heads, "dim": dim}
        predicted = {
            str(count): statistics_of(options, count, inputs[0], inputs[1], scaling) for count in options.choices
        }
        result["texts"][text] = shape | {"predicted": predicted}
        print(text, shape, flush=True)
        for listed, held in predicted.items():
            print(f"  {listed:>4} tiles: {held}", flush=True)
    for name in contenders:
        for count in options.choices if name in WITH_TILES else [None]:
            if is_late(options, began):
                print(f"{text:24}  {name:13} {count or '':4}  not begun after {options.deadline} s", flush=True)
                continue
            for row in measure(options, name, count, inputs, scaling):
                result["rows"].append({"text": text, **row})
                told = row.get("error") or (
                    f"{row['pass']:16} {row['median_ms']:9.3f}, {row['captured_ms'] or float('nan'):9.3f} ms"
                )
                print(f"{text:24}  {name:13} {count or '':4}  {told}", flush=True)
        if options.output:
            write_json(options.output, result)


if __name__ == "__main__":
    main()
