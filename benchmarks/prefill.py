"""How long a text takes until its first token, with dense and with sparse attention, in calls that alternate.

    python benchmarks/prefill.py --output prefill.json
    python benchmarks/prefill.py --method sparsefinder --output entmax_prefill.json

    forward       `model(ids, use_cache=True, logits_to_keep=1)`: the text is read, and a cache holds it
    uncached      the same with `use_cache=False`
    new           `forward` where nothing recorded is played, as the first texts of about a length are read
    new_uncached  `uncached` likewise
    generate      default `generate` of one new token
    varied        the same with prompts up to a twentieth shorter, where those of `generate` were played as CUDA graphs

`played` counts the measured texts that were played. The first four calls of each are discarded: texts of a length that
comes again are recorded beside the third. A cell ends after `--rounds`, or after `--seconds`.

The dense model is the base model without a patch; the patched one shares its weights, which are random and change
neither time nor memory. The host that launches the kernels sets the pace of short texts and varies, so only ratios of
one cell count: calls alternate, each time is the median of several, and the ratio is the median of those of the pairs,
for within seconds a host that others use may become half as fast. With `--head-shares` the KV heads of the sparse model
select different numbers of keys, as those of an adapter that `finetune` has divided.

First, on two layers in float32: the logits of a text that fits into the slots equal dense ones, and those of a longer
one the logits of the plain PyTorch path; without agreement nothing is measured. Sparsefinder attends to all keys by
entmax up to 8,192 tokens, and `pooled` to tiles of them beyond; its scales leave about `--support` keys with weight at
the end of a text of `--fitted` tokens, and its logits are compared with those of plain PyTorch alone. A profile counts
the kernels of a forward and their time. The JSON is written after every cell.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from generate import add_options, make_models  # beside this file
from llamas import SHAPES
from measuring import current_commit, kernels_of, profiler, wait
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse._compat import cache_of
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops.entmax import api as entmax
from hf_sparse.ops.selection import api
from hf_sparse.patches import sparse_layers, unrecorded

ALLOWED = 1e-3  # largest relative difference of the comparison
DISCARDED = 4  # calls before those that count
LEAST = 3  # calls that count, however long they take


def forward(model: PreTrainedModel, ids: Tensor) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=True, logits_to_keep=1)


def uncached(model: PreTrainedModel, ids: Tensor) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=False, logits_to_keep=1)


def generate(model: PreTrainedModel, ids: Tensor) -> Any:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)  # type: ignore[operator]


def new(model: PreTrainedModel, ids: Tensor) -> Any:
    with unrecorded():
        return forward(model, ids)


def new_uncached(model: PreTrainedModel, ids: Tensor) -> Any:
    with unrecorded():
        return uncached(model, ids)


CALLS: dict[str, Callable[[PreTrainedModel, Tensor], Any]] = {
    "forward": forward,
    "uncached": uncached,
    "new": new,
    "new_uncached": new_uncached,
    "generate": generate,
    "varied": generate,
}


def check(shape: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Largest relative difference of the last token's logits, from dense ones and from the plain PyTorch path.

    Raises:
        SystemExit: a difference that rounding does not explain, or slots that hold other tokens.
    """
    models = make_models(shape | {"num_hidden_layers": 2}, options, torch.float32)

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    if options.method == "sparsefinder":
        ids = torch.randint(0, 100, (2, options.fitted), device=options.device)
        kernels = forward(models["sparse"], ids)
        with mock.patch.object(entmax, "takes_kernels", lambda *_: False):
            differences = {"from plain": relative(kernels.logits, forward(models["sparse"], ids).logits)}
        return agreeing(differences)
    slots = min(layer.dense_tokens for layer in sparse_layers(models["sparse"]))
    short, long = (torch.randint(0, 100, (2, n), device=options.device) for n in (slots, 3 * slots + 7))
    differences = {"short from dense": relative(*(forward(models[name], short).logits for name in ("sparse", "dense")))}
    kernels = forward(models["sparse"], long)
    differences["long without a cache"] = relative(uncached(models["sparse"], long).logits, kernels.logits)
    with mock.patch.object(api, "_takes_kernels", lambda *_: False):
        plain = forward(models["sparse"], long)
    differences["long from plain"] = relative(kernels.logits, plain.logits)
    kept = [[layer.positions.sort(-1).values for layer in cache_of(one).layers] for one in (kernels, plain)]
    if not all(torch.equal(a, b) for a, b in zip(*kept, strict=True)):
        sys.exit("the cache keeps other tokens than that of the plain path: nothing measured")
    return agreeing(differences)


def agreeing(differences: dict[str, float]) -> dict[str, float]:
    """Return the differences, or end the program where rounding does not explain one."""
    if not all(difference <= ALLOWED for difference in differences.values()):
        sys.exit(f"logits differ by more than {ALLOWED}: {differences}; nothing measured")
    return differences


def measure(models: dict[str, PreTrainedModel], ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the calls by variant, from calls that alternate, and the kernels of a forward."""
    row: dict[str, Any] = {}
    recorded = sparse_layers(models["sparse"])[0].model_switch.prompts  # type: ignore[union-attr]
    for call in options.calls:
        run = CALLS[call]
        if call == "varied" and not row.get("generate", {}).get("played"):
            continue
        times: dict[str, list[float]] = {name: [] for name in models}
        played, started = recorded.played, time.perf_counter()
        for number in range(DISCARDED + options.rounds):
            if number == DISCARDED:
                played = recorded.played
            if number >= DISCARDED + LEAST and time.perf_counter() - started > options.seconds:
                break
            text = ids[:, : ids.shape[1] - (number % 4 * ids.shape[1] // 64 if call == "varied" else 0)]
            for name in sorted(models, reverse=number % 2 == 1):  # each is the first of a pair as often
                wait(options.device)
                begin = time.perf_counter()
                run(models[name], text)
                wait(options.device)
                times[name].append(1e3 * (time.perf_counter() - begin))
        medians = {name: statistics.median(of_name[DISCARDED:]) for name, of_name in times.items()}
        row[call] = {f"{name}_ms": ms for name, ms in medians.items()} | {
            "first_ms": {n: t[0] for n, t in times.items()},
            "calls": len(times["sparse"]) - DISCARDED,
            "played": recorded.played - played,
        }
        pairs = zip(times["dense"][DISCARDED:], times["sparse"][DISCARDED:], strict=True)
        row[call]["ratio"] = statistics.median([dense / sparse for dense, sparse in pairs])
    row["profile"] = {}
    for name, model in models.items():
        with profiler(options.device) as seen:
            new(model, ids)
            wait(options.device)
        row["profile"][name] = kernels_of(seen.events() or [], 1)
    return row


def memory_of_recordings(model: PreTrainedModel) -> float:
    """Megabytes of GPU memory that the recorded prompts of a model hold; they are forgotten."""
    reserved = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
        sparse_layers(model)[0].model_switch.prompts.clear()  # type: ignore[union-attr]
    return (reserved[0] - reserved[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384], help="tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=list(CALLS), help="what is measured")
    parser.add_argument("--method", choices=["sparsek", "sparsefinder"], default="sparsek")
    parser.add_argument("--predictor", choices=["full", "pooled"], default="pooled", help="Sparsefinder's")
    parser.add_argument("--support", type=float, default=55.0, help="keys with weight per query, for Sparsefinder")
    parser.add_argument("--fitted", type=int, default=1024, help="tokens that Sparsefinder is fitted to and checked on")
    parser.add_argument("--rounds", type=int, default=15, help="calls that count")
    parser.add_argument("--seconds", type=float, default=3, help="after which a cell ends with fewer calls")
    parser.add_argument("--head-shares", action="store_true", help="other numbers of keys for every KV head")
    parser.add_argument("--no-check", action="store_true", help="measure without the comparison, for a trial")
    add_options(parser)
    options = parser.parse_args()
    options.complete, options.cluster_parts, options.new_tokens = False, 1, 1  # what `make_models` asks for
    named: tuple[str, ...] = ("prompts", "batch", "calls", "rounds", "seconds", "method", "device", "dtype", "tiny")
    named += (
        ("k", "window", "sinks", "head_shares") if options.method == "sparsek" else ("predictor", "support", "fitted")
    )
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "prefill",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in named},
        "differences": {},
        "recordings_mb": {},
        "rows": [],
        **describe(),
    }
    for shape in options.shapes:
        if not options.no_check:
            result["differences"][shape] = check(SHAPES[shape], options)
        models = make_models(SHAPES[shape], options, getattr(torch, options.dtype))
        layers = models["dense"].config.num_hidden_layers
        for length in options.prompts:
            ids = torch.randint(0, models["dense"].config.vocab_size, (options.batch, length), device=options.device)
            row = {"shape": shape, "layers": layers, "prompt": length, "batch": options.batch}
            row |= measure(models, ids, options)
            result["rows"].append(row)
            told = [
                f"{call} {row[call]['dense_ms']:.2f} / {row[call]['sparse_ms']:.2f} ms ({row[call]['ratio']:.2f})"
                + (f" {row[call]['played']} of {row[call]['calls']} played" if row[call]["played"] else "")
                for call in CALLS
                if call in row
            ]
            counts = [
                f"{name} {p['launches']} launches, {p['kernels_ms']:.2f} ms" for name, p in row["profile"].items()
            ]
            print(f"{shape:10} {length:6}  {'  '.join((*told, *counts))}", flush=True)
            if options.output:
                write_json(options.output, result)
        if options.device == "cuda":
            result["recordings_mb"][shape] = memory_of_recordings(models["sparse"])
            print(f"{shape:10} recorded prompts hold {result['recordings_mb'][shape]:.0f} MB", flush=True)
            if options.output:
                write_json(options.output, result)
        del models
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
