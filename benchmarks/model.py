"""How fast whole models are with dense and with sparse attention: decoding, prefill, and training the scorers.

    python benchmarks/model.py --output model.json

    decode   steps of `generate` of an 8B-shaped Llama: the dynamic cache (eager), the static cache (compiled by
             transformers), and the slots of SparseK, eager and compiled
    prefill  the forward of a prompt by the same model, with a cache at the end of it
    train    forward and backward of the objective `distill` in a SmolLM2-shaped model, and its dense teacher's forward

Weights are random: they change neither time nor memory. Before decoding, a cache is filled with random keys and values
of the wanted length, in place of a prompt, which would take most of the run; every step then reads what it would read
after a prompt of that length. The share of the roofline is the time to read all weights of a step and the keys and
values once, at the bandwidth of a large copy in the same run, over the time that a step took.

First, on two layers in float32, sparse steps are compared with dense ones over a text that fits into the slots, and
compiled with eager ones over a longer text; without agreement nothing is measured. The JSON is written after every
row, most important rows first. A run that finds a JSON of the same commit, machine and settings goes on where that one
stopped, and `--deadline` ends a run between two rows.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llamas import LLAMA_8B, SMOLLM2, make_llama  # beside this file
from measuring import QUANTILES, copy_bandwidth, current_commit, wait
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache

from hf_sparse import SparseKCache, SparseKConfig, patch, unpatch
from hf_sparse._compat import with_cache
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.evaluation import kv_bytes
from hf_sparse.finetune.objectives import distill, switched_off
from hf_sparse.finetune.predictions import predict
from hf_sparse.patches import sparse_layers, sparse_layers_in_use

SKIPPED = 8  # first steps of a run, in which CUDA graphs are recorded
ALLOWED = 1e-3  # largest relative difference of the comparison
STATIC = 128  # lengths of a static cache are multiples of this, which suits the dense kernels
VARIANTS = ("dynamic", "static", "sparse", "sparse eager")


def make_model(options: argparse.Namespace, shape: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A Llama with random weights whose greedy text never ends."""
    longest = max(options.contexts) + options.steps + STATIC
    return make_llama(shape, longest, dtype=dtype, device=options.device, tiny=options.tiny)


def budget(options: argparse.Namespace) -> SparseKConfig:
    return SparseKConfig(k=options.k, window=options.window, sinks=options.sinks)


def random_keys(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    return torch.randn(shape, dtype=model.dtype, device=model.device)


def filled(model: PreTrainedModel, variant: str, batch: int, context: int, new: int) -> Cache:
    """A cache that holds `context` tokens and has room for `new` ones; random keys and values."""
    if variant.startswith("sparse"):
        return sparse_cache(model, batch, context)
    if variant == "static":
        room = -(-(context + new) // STATIC) * STATIC
        cache: Cache = StaticCache(config=model.config, max_cache_len=room)
    else:
        cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(random_keys(model, batch, context), random_keys(model, batch, context), layer)
    return cache


def sparse_cache(model: PreTrainedModel, batch: int, context: int) -> Cache:
    """Sinks, window, and any `k` of the tokens between."""
    cache: Any = SparseKCache(model)
    for layer in cache.layers:
        tokens = min(context, layer.slots)
        between = torch.linspace(layer.sinks, context - layer.window - 1, layer.k)
        ends = [torch.arange(layer.sinks), between.round().long(), torch.arange(context - layer.window, context)]
        positions = torch.cat(ends) if context > layer.slots else torch.arange(context)
        keys, values = random_keys(model, batch, tokens), random_keys(model, batch, tokens)
        layer.lazy_initialization(keys, values)
        generator = torch.Generator(keys.device).manual_seed(0)  # keys and values are those of a dense cache
        scores = torch.randn(keys.shape[:3], generator=generator, device=keys.device)
        seen = torch.full((batch,), context, device=keys.device)
        layer.fill(keys, values, scores, positions.to(keys.device).expand(keys.shape[:3]), seen)
        layer.cumulative_length += context
        layer.note_tokens(context)
    return cache


class Watch(LogitsProcessor):
    """Marks every step, and keeps its logits if asked to."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.logits: list[Tensor] = []
        self.marks: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        if self.keep:
            self.logits.append(scores.double())
        return scores

    def milliseconds(self) -> list[float]:
        """Of every step but the first ones."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[SKIPPED:]
        if isinstance(self.marks[0], float):
            return [1e3 * (after - before) for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


def steps(model: PreTrainedModel, cache: Cache, batch: int, context: int, new: int, watch: Watch, eager: bool) -> None:
    """`new` tokens by `generate`, after `context` ones that the cache holds."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), generator=generator).to(model.device)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        **with_cache(cache),
        max_new_tokens=new,
        do_sample=False,
        disable_compile=eager,
        logits_processor=LogitsProcessorList([watch]),
    )


def start_over(model: PreTrainedModel) -> None:
    """Forget compiled code and give its memory back."""
    torch.compiler.reset()
    model.__dict__.pop("_compiled_call", None)
    gc.collect()
    if torch.cuda.is_available():
        torch._inductor.cudagraph_trees.reset_cudagraph_trees()
        torch.cuda.empty_cache()


def prepare(model: PreTrainedModel, variant: str, options: argparse.Namespace) -> None:
    """Sparse attention on or off, and no compiled code."""
    if sparse_layers(model):
        unpatch(model)
    start_over(model)
    if variant not in ("dynamic", "static", "dense"):
        patch(model, budget(options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("sparsek_scorer" in name)


def check(options: argparse.Namespace) -> dict[str, float]:
    """Largest relative difference of a step's logits, `|a - b| / |b|`.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    model = make_model(options, LLAMA_8B | {"num_hidden_layers": 2, "vocab_size": 4096}, torch.float32)
    slots = budget(options).slots

    def logits(variant: str, context: int) -> Tensor:
        prepare(model, variant, options)
        torch.manual_seed(0)
        watch = Watch(keep=True)
        cache = filled(model, variant, 2, context, 12)
        steps(model, cache, 2, context, 12, watch, eager=variant == "sparse eager")
        return torch.stack(watch.logits)

    pairs = {"compiled": (logits("sparse", 3 * slots), logits("sparse eager", 3 * slots))}
    short = slots - 20
    pairs["within the slots"] = (logits("sparse eager", short), logits("dynamic", short))
    found = {name: float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for name, (a, b) in pairs.items()}
    if not all(difference <= ALLOWED for difference in found.values()):
        sys.exit(f"nothing measured: steps differ by {found}, more than {ALLOWED}")
    return found


def decode(options: argparse.Namespace, model: PreTrainedModel, variant: str, context: int, batch: int) -> dict:
    """Throughput of steps, KV bytes, and the bytes that a step must read."""
    eager = variant in ("dynamic", "sparse eager")
    new = SKIPPED + options.steps
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    cache = filled(model, variant, batch, context, new)
    watch = Watch()
    begin = time.perf_counter()
    steps(model, cache, batch, context, new, watch, eager)
    seconds = time.perf_counter() - begin
    found = sorted(watch.milliseconds())
    median = statistics.median(found)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedding:
        weights -= embedding.numel() * embedding.element_size()  # type: ignore[operator]  # a row per token is read
    held = kv_bytes(cache)
    low, high = (found[int(q * (len(found) - 1))] for q in QUANTILES[1:])
    return {
        "step_ms": {"median_ms": median, "p20_ms": low, "p80_ms": high},
        "tokens_per_second": 1e3 * batch / median,
        "kv_bytes": held,
        "bytes_per_step": weights + held,
        "seconds_with_compilation": seconds,
    }


def prefill(options: argparse.Namespace, model: PreTrainedModel, variant: str, context: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=generator).to(model.device)

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    return timed(forward, options)


def train(options: argparse.Namespace, model: PreTrainedModel, variant: str, context: int) -> dict:
    """Forward and backward of the scorers, or the forward of their dense teacher."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=generator).to(model.device)
    for layer in sparse_layers_in_use(model):
        layer.train()
    learned = [p for p in model.parameters() if p.requires_grad]

    def teacher() -> None:
        with torch.no_grad(), switched_off(model):
            predict(model, ids, use_cache=False)

    def step() -> None:
        torch.autograd.grad(distill(model, ids), learned)

    row = timed(teacher if variant == "dense teacher" else step, options)
    row["tokens_per_second"] = 1e3 * context / row["median_ms"]
    row["trainable_parameters"] = sum(p.numel() for p in learned)
    return row


def timed(run: Callable[[], None], options: argparse.Namespace) -> dict[str, Any]:
    """Median and quantiles, and the memory on top of what was there; of what takes long, at least one run."""
    begin = time.perf_counter()
    run()
    wait(options.device)
    row: dict[str, Any] = {"first_call_s": time.perf_counter() - begin}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    times: list[float] = []
    while sum(times) < options.repeat_ms or (len(times) < 3 and sum(times) < 5 * options.repeat_ms):
        begin = time.perf_counter()
        run()
        wait(options.device)
        times.append(1e3 * (time.perf_counter() - begin))
    if options.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    low, high = (sorted(times)[int(q * (len(times) - 1))] for q in QUANTILES[1:])
    return row | {"median_ms": statistics.median(times), "p20_ms": low, "p80_ms": high, "runs": len(times)}


def cells(options: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """Part, variant, context and batch, in the order in which they matter; one compilation serves its neighbours."""
    pairs = [(context, batch) for batch in options.batches for context in options.contexts]
    first = [pair for pair in ((32_768, 4), (16_384, 8), (131_072, 4)) if pair in pairs]
    rest = [pair for pair in pairs if pair not in first]
    by_batch = sorted(pairs, key=lambda pair: (pair[1] not in (4, 8), pair[1], pair[0]))
    prefills = [("prefill", variant, context, 1) for context in options.contexts for variant in ("sparse", "dense")]
    found = [("train", variant, length, 1) for variant in ("scorers", "dense teacher") for length in options.train]
    found += sorted(prefills, key=lambda cell: cell[2] > 65_536)
    found += [("decode", "sparse", *pair) for pair in by_batch]
    found += [("decode", "dynamic", *pair) for pair in (*first, *rest)]
    found += [("decode", "sparse eager", *pair) for pair in by_batch if pair[0] == 32_768]
    found += [("decode", "static", *pair) for pair in (*first, *sorted(rest, key=math.prod))]
    wanted = [cell for cell in found if not options.only or cell[0] in options.only or cell[1] in options.only]
    return [cell for cell in wanted if not options.cells or f"{cell[2]}x{cell[3]}" in options.cells]


def fits(model: PreTrainedModel, variant: str, context: int, batch: int) -> str | None:
    """Why a cell is not measured, or `None`; a growing cache needs room for a layer's copy as well."""
    if model.device.type != "cuda" or variant.startswith("sparse"):
        return None
    layers = model.config.num_hidden_layers
    layer = 2 * 2 * context * batch * model.config.hidden_size // model.config.num_attention_heads
    layer *= model.config.num_key_value_heads
    needed = layer * (layers + (2 if variant == "dynamic" else 5)) + (3 << 30)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    there = torch.cuda.get_device_properties(model.device).total_memory
    if weights + needed <= 0.97 * there:
        return None
    return f"needs about {(weights + needed) / 2**30:.0f} GiB of {there / 2**30:.0f} GiB"


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """A result without rows, or the one that an earlier run left unfinished."""
    names = ("k", "window", "sinks", "steps", "device", "dtype", "tiny")
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "model",
        "settings": {name: getattr(options, name) for name in names} | {"decoded": LLAMA_8B, "trained": SMOLLM2},
        "commit": options.commit or current_commit(),
        **describe(),
    }
    if options.output and options.output.exists():
        earlier = json.loads(options.output.read_text("utf-8"))
        if all(earlier.get(name) == content for name, content in result.items()):
            return earlier
    return result | {"differences": {}, "bandwidth": None, "rows": []}


def measure(options: argparse.Namespace, model: PreTrainedModel, cell: tuple[str, str, int, int]) -> dict[str, Any]:
    part, variant, context, batch = cell
    row: dict[str, Any] = {"part": part, "variant": variant, "context": context, "batch": batch}
    if part == "decode" and (reason := fits(model, variant, context, batch)):
        return row | {"skipped": reason}
    try:
        if part == "decode":
            return row | decode(options, model, variant, context, batch)
        return row | (prefill if part == "prefill" else train)(options, model, variant, context)
    except (RuntimeError, NotImplementedError) as error:  # no memory, or what torch does not compile
        return row | {"error": str(error).splitlines()[0]}


def told(row: dict[str, Any], bandwidth: float) -> str:
    if reason := row.get("error") or row.get("skipped"):
        return reason
    if row["part"] != "decode":
        return f"{row['median_ms']:10.2f} ms"
    ideal = 1e3 * row["bytes_per_step"] / bandwidth
    median = row["step_ms"]["median_ms"]
    return (
        f"{median:8.2f} ms  {row['tokens_per_second']:9.1f} tokens/s  {row['kv_bytes'] / 2**20:9.0f} MiB of KV  "
        f"{ideal / median:5.0%} of the roofline"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--train", type=int, nargs="*", default=[8192, 32768], help="tokens of a training step")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps that are measured")
    parser.add_argument("--k", type=int, default=508)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=["decode", "prefill", "train", *VARIANTS])
    parser.add_argument("--cells", nargs="+", help="contexts and batches to measure, as in 32768x4")
    parser.add_argument("--after", type=Path, help="the JSON of an earlier run, whose rows are not measured again")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeat-ms", type=int, default=1000, help="how long prefill and training are repeated")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to try the benchmark out")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no row begins")
    parser.add_argument("--no-check", action="store_true", help="for runs whose rows nobody reads")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, help="the JSON to write, and to go on with")
    options = parser.parse_args()
    clock = time.monotonic()
    result = begin(options)
    if not result["differences"] and not options.no_check:
        result["differences"] = check(options)
        print("differences:", result["differences"], flush=True)
    result["bandwidth"] = result["bandwidth"] or copy_bandwidth(options.device)
    print(f"copy: {result['bandwidth'] / 1e12:.2f} TB/s", flush=True)
    rows = list(result["rows"])
    if options.after:
        rows += json.loads(options.after.read_text("utf-8"))["rows"]
    done = {(row["part"], row["variant"], row["context"], row["batch"]) for row in rows}
    model, shape, ready = None, None, None
    for cell in cells(options):
        if cell in done:
            continue
        if time.monotonic() - clock > options.deadline:
            print("out of time", flush=True)
            break
        wanted = SMOLLM2 if cell[0] == "train" else LLAMA_8B
        if shape is not wanted:
            model = None
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            model, shape = make_model(options, wanted, getattr(torch, options.dtype)), wanted
        assert model is not None
        part, variant, context, batch = cell
        compiled = (part, variant, batch, context if variant == "static" else None)  # what one compilation serves
        if ready != compiled:
            prepare(model, variant, options)
            ready = compiled
        row = measure(options, model, cell)
        result["rows"].append(row)
        print(f"{cell[0]:8} {cell[1]:13} {cell[2]:7} x {cell[3]:2}  {told(row, result['bandwidth'])}", flush=True)
        if options.output:
            write_json(options.output, result)


if __name__ == "__main__":
    main()
