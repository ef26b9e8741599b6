"""How fast default `generate` goes on with dense and with sparse attention, in calls that alternate in one process.

    python benchmarks/generate.py --output generate.json

Nothing is passed to `generate` but a prompt, its mask and a count of new tokens: dense steps run eager with a cache
that grows, sparse ones with KV slots (or, of Sparsefinder, all keys), on a GPU recorded from the third on. Milliseconds
of a step leave out the steps before and the recording, those of a call have them. The dense model is the base model
without a patch; the patched one shares its weights, which are random and change neither time nor memory. The host that
launches the kernels sets the pace and varies, so only ratios of the same cell count: calls alternate, and each number
is the median of several. The first call of each is kept apart, as the first of `steps_ms`: dense steps are slower at
lengths that a process has not seen, which is every text of a user, since SDPA takes cuDNN there, which plans for every
length.

First, on two layers in float32: sparse steps equal dense ones over a text that fits into the slots, and over a longer
one the step in one kernel, and on the CPU the one that is foreseen, fills the same slots as the step of several and has
the same logits; without agreement nothing is measured. The JSON is written after every cell. A profile counts the
launches of a step.
"""

import argparse
import copy
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llamas import SHAPES, draw_shares, make_llama  # beside this file
from measuring import current_commit, kernels_of, profiler, wait
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_sparse import SparsefinderConfig, SparseKConfig, patch
from hf_sparse._compat import cache_of
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.methods.sparsefinder import attention as sparsefinder
from hf_sparse.methods.sparsefinder.attention import AttentionInputs, Observer
from hf_sparse.methods.sparsefinder.predictors import clustering
from hf_sparse.methods.sparsek import attention
from hf_sparse.ops.entmax import step as few
from hf_sparse.ops.entmax.threshold import distribution
from hf_sparse.patches import sparse_layers

SKIPPED = 4  # first steps of a call
PROFILED = 4  # steps under the profiler
CHECKED = 32  # steps of the comparison with dense attention
ALLOWED = 1e-3  # largest relative difference of the comparison


class Clock(LogitsProcessor):
    """Reads the time after the first token, after the skipped steps and after the last one."""

    def __init__(self, steps: int) -> None:
        self.at, self.step, self.times = (1, SKIPPED, steps), 0, [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.step in self.at:
            wait(scores.device.type)
            self.times.append(time.perf_counter())
        return scores


class Follow(LogitsProcessor):
    """Makes `generate` take given tokens `[B, N]`, and keeps the logits of every step."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[:, len(self.logits), None]
        self.logits.append(scores.double())
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class Profiled(LogitsProcessor):
    """Profiles the steps after the skipped ones."""

    def __init__(self, device: str) -> None:
        self.profiler, self.device, self.step = profiler(device), device, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.step in (SKIPPED, SKIPPED + PROFILED):
            wait(self.device)
            self.profiler.start() if self.step == SKIPPED else self.profiler.stop()
        return scores


def make_models(shape: dict[str, Any], options: argparse.Namespace, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """A Llama with random weights, and a patched copy that shares them."""
    longest = max(*options.prompts, options.fitted) + options.new_tokens
    dense = make_llama(shape, longest, dtype=dtype, device=options.device, tiny=options.tiny)
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    config: Any = dense.config
    shares = draw_shares(config) if getattr(options, "head_shares", False) else None
    sparse = patch(copy.deepcopy(dense, shared), configuration(options, shares))
    if options.method == "sparsefinder":
        ids = torch.randint(0, dense.config.vocab_size, (1, options.fitted), device=options.device)
        fit(sparse, ids, options)
    return {"dense": dense, "sparse": sparse}


def configuration(
    options: argparse.Namespace, shares: list[list[float]] | None = None
) -> SparseKConfig | SparsefinderConfig:
    """Return the settings of the sparse model; `shares`: of the KV heads, for SparseK."""
    if options.method == "sparsek":
        return SparseKConfig(k=options.k, window=options.window, sinks=options.sinks, head_shares=shares)
    if options.predictor == "pooled":
        return SparsefinderConfig(predictor="pooled", complete=options.complete)
    graph: dict[str, Any] = {"tile": 8, "query_tile": 1, "sparsity": 0.8, "clusters": 16, "window": 64}
    if options.cluster_parts > 1:  # as the published adapters have it
        parts = options.cluster_parts
        graph |= {"rank": parts, "cluster_parts": parts, "top_clusters": 1, "head_budgets": True}
    return SparsefinderConfig(predictor=options.predictor, complete=options.complete, **graph)


def fit(model: PreTrainedModel, ids: Tensor, options: argparse.Namespace) -> None:
    """Give every head a scale at which about `options.support` keys have weight, and fit what predicts graphs."""

    def scale(layer: SparsefinderAttention) -> Observer:
        def observe(text: AttentionInputs, *rest: Any) -> None:
            query, key = text.query[:, :, -64:].float(), text.key.float()
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            z = query @ key.transpose(-1, -2) * 0.5 * query.shape[-1] ** -0.5
            seen = torch.ones(z.shape[2:], dtype=torch.bool, device=z.device).tril(z.size(3) - z.size(2))
            z = z.masked_fill_(~seen, -torch.inf)
            low, high = torch.full_like(z[0, :, 0, 0], 1e-2), torch.full_like(z[0, :, 0, 0], 1e3)
            for _ in range(14):
                middle = (low * high).sqrt()
                support = (distribution(z * middle[:, None, None], 2.0) > 0).sum(-1).float().mean((0, 2))
                more = support > options.support
                low, high = torch.where(more, middle, low), torch.where(more, high, middle)
            layer.parameters_in_use.log_scale.data.copy_(middle.log())

        return observe

    layers = sparse_layers(model, SparsefinderAttention)
    learned = [layer.parameters_in_use.predictor for layer in layers]
    if learned[0].learns_graph:
        fit_predictors(layers, lambda: model(ids, use_cache=False))
    for layer in layers:
        layer.pattern, layer.observer = (lambda text: None), scale(layer)
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    for layer in layers:
        layer.pattern = layer.observer = None


def generate(model: PreTrainedModel, ids: Tensor, new: int, watch: LogitsProcessor, mask: Tensor | None = None) -> Any:
    return model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([watch]),
    )


def check(shape: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Largest relative difference of a step's logits: sparse from dense, and one kernel from several.

    Raises:
        SystemExit: a difference that rounding does not explain, or slots that hold other tokens.
    """
    models = make_models(shape | {"num_hidden_layers": 2}, options, torch.float32)
    if options.method == "sparsefinder":
        return check_kernels(models["sparse"], options)
    slots = options.k + options.window + options.sinks
    vocabulary = models["dense"].config.vocab_size

    def relative(a: list[Tensor], b: list[Tensor]) -> float:
        return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))

    short = torch.randint(0, vocabulary, (2, slots), device=options.device)
    new = min(CHECKED, slots // 2)
    mask = torch.ones_like(short)[:, :-new]
    mask[1, :7] = 0
    logits = []
    for model in models.values():
        follow = Follow(short[:, -new:])
        generate(model, short[:, :-new], new, follow, mask)
        logits.append(follow.logits)
    differences = {"sparse from dense": relative(*reversed(logits))}
    long = torch.randint(0, vocabulary, (2, 2 * slots), device=options.device)
    ends = []
    for several in (False, True):
        follow = Follow(long[:, slots:])
        with ExitStack() as plain:
            for name in ("step_in_one_kernel", "step_ahead") if several else ():
                if hasattr(attention, name):  # an earlier commit may lack it
                    plain.enter_context(mock.patch.object(attention, name, lambda *_: None))
            cache = cache_of(generate(models["sparse"], long[:, :slots], slots, follow))
        ends.append((follow.logits, [layer.positions for layer in cache.layers]))
    differences["one kernel from several"] = relative(ends[0][0], ends[1][0])
    if not all(torch.equal(*layers) for layers in zip(ends[0][1], ends[1][1], strict=True)):
        sys.exit("the step in one kernel keeps other tokens than the step of several: nothing measured")
    if not all(difference <= ALLOWED for difference in differences.values()):
        sys.exit(f"steps differ by more than {ALLOWED}: {differences}; nothing measured")
    return differences


def check_kernels(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, float]:
    """Return the largest relative difference of a step's logits in the kernels from those in plain PyTorch.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    ids = torch.randint(0, model.config.vocab_size, (2, options.fitted), device=options.device)
    mask = torch.ones_like(ids)[:, :-CHECKED]
    mask[1, :7] = 0
    logits = []
    for kernels in (True, False):
        follow = Follow(ids[:, -CHECKED:])
        with ExitStack() as plain:
            if not kernels:
                plain.enter_context(mock.patch.object(few, "takes_kernels", lambda *_: False))
                plain.enter_context(mock.patch.object(clustering, "takes_kernel", lambda *_: False))
                plain.enter_context(mock.patch.object(sparsefinder, "take_step", lambda *_: None))
            generate(model, ids[:, :-CHECKED], CHECKED, follow, mask)
        logits.append(follow.logits)
    difference = max(float((x - y).norm() / y.norm()) for x, y in zip(*logits, strict=True))
    if not difference <= ALLOWED:
        sys.exit(f"steps in the kernels differ by {difference}, more than {ALLOWED}; nothing measured")
    return {"kernels from plain": difference}


def measure(models: dict[str, PreTrainedModel], ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step and to the first token, by variant, from calls that alternate."""
    first: dict[str, list[float]] = {name: [] for name in models}
    step: dict[str, list[float]] = {name: [] for name in models}
    call: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + options.rounds):
        for name, model in models.items():
            wait(options.device)
            clock = Clock(options.new_tokens)
            generate(model, ids, options.new_tokens, clock)
            begin, token, settled, end = clock.times
            first[name].append(1e3 * (token - begin))
            call[name].append(1e3 * (end - begin))
            step[name].append(1e3 * (end - settled) / (options.new_tokens - SKIPPED))
    row: dict[str, Any] = {}
    for name in models:
        again = statistics.median(step[name][1:])
        row[name] = {
            "step_ms": again,
            "steps_ms": step[name],
            "first_token_ms": statistics.median(first[name][1:]),
            "call_ms": statistics.median(call[name][1:]),
            "tokens_per_second": 1e3 * len(ids) / again,
        }
    return row | {"ratio": row["dense"]["step_ms"] / row["sparse"]["step_ms"]}


def profiles(models: dict[str, PreTrainedModel], ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Kernels of one step, by variant."""
    rows = {}
    for name, model in models.items():
        watch = Profiled(options.device)
        generate(model, ids, SKIPPED + PROFILED + 1, watch)
        rows[name] = kernels_of(watch.profiler.events() or [], PROFILED)
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks of whole models have: the budget, where to run, and what to write."""
    parser.add_argument("--k", type=int, default=508)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a trial")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--output", type=Path, help="where to write the JSON")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 8192], help="tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=["sparsek", "sparsefinder"], default="sparsek")
    parser.add_argument("--predictor", default="full", help="Sparsefinder's; 'full' attends to all keys by entmax")
    parser.add_argument("--cluster-parts", type=int, default=1, help="parts of a code, and then budgets of heads")
    parser.add_argument("--complete", action="store_true", help="complete Sparsefinder's graphs")
    parser.add_argument("--support", type=float, default=55.0, help="keys with weight per query, for Sparsefinder")
    parser.add_argument("--fitted", type=int, default=2048, help="tokens that Sparsefinder is fitted to and checked on")
    parser.add_argument("--no-check", action="store_true", help="measure without the comparison, for a trial")
    add_options(parser)
    options = parser.parse_args()
    if options.new_tokens <= SKIPPED + PROFILED:
        parser.error(f"more than {SKIPPED + PROFILED} new tokens are needed, got {options.new_tokens}")
    of_method: dict[str, tuple[str, ...]] = {
        "sparsek": ("k", "window", "sinks"),
        "sparsefinder": ("method", "predictor", "cluster_parts", "complete", "support", "fitted"),
    }
    named = ("prompts", "batches", "new_tokens", "rounds", *of_method[options.method], "device", "dtype", "tiny")
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "generate",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in named},
        "differences": {},
        "rows": [],
        **describe(),
    }
    for name in options.shapes:
        if not options.no_check:
            result["differences"][name] = check(SHAPES[name], options)
        models = make_models(SHAPES[name], options, getattr(torch, options.dtype))
        layers = models["dense"].config.num_hidden_layers
        for length in options.prompts:
            for batch in options.batches:
                ids = torch.randint(0, models["dense"].config.vocab_size, (batch, length), device=options.device)
                row = {"shape": name, "layers": layers, "prompt": length, "batch": batch}
                row |= measure(models, ids, options)
                if length == min(options.prompts) and batch == min(options.batches):
                    row["profile"] = profiles(models, ids, options)
                result["rows"].append(row)
                print(
                    f"{name:10} {length:6} x {batch}  dense {row['dense']['step_ms']:7.2f} ms  sparse "
                    f"{row['sparse']['step_ms']:7.2f} ms  {row['ratio']:.2f} times  first token "
                    f"{row['dense']['first_token_ms']:.0f} and {row['sparse']['first_token_ms']:.0f} ms",
                    flush=True,
                )
                if options.output:
                    write_json(options.output, result)
        del models
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
