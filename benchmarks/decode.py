"""How fast a text goes on, one token at a time: dense and sparse attention, eager and compiled, and their KV bytes.

    python benchmarks/decode.py --model demo --output decode.json

`generate` does everything, with `cache_implementation="static"` where it compiles. The sparse model is the same
checkpoint, patched, with scorers that nobody trained: what they choose changes neither time nor memory. First, in
float32, compiled steps are compared with eager ones on the same tokens; without agreement nothing is measured. Those
are tokens without repetition: in the first layer a repeated token has the same score as before, and the last bits of
a compiled step, which are not those of the eager prefill, would decide between the two.

Prompts are random tokens, and may be longer than the texts that the model was trained on: the numbers are about time
and memory, not about what the model says.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_sparse import SparseKConfig, patch, unpatch
from hf_sparse._compat import cache_of
from hf_sparse.atomic_files import write_json
from hf_sparse.demo import BASE_NAME, CHECKPOINT
from hf_sparse.environment import describe
from hf_sparse.evaluation import kv_bytes

SKIPPED = 8  # first steps of a run, in which CUDA graphs are recorded
CHECKED = 48  # steps of the comparison
ALLOWED = 1e-2  # its largest relative difference


class Follow(LogitsProcessor):
    """Makes `generate` take given tokens, and keeps the logits of every step."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[len(self.logits)]
        self.logits.append(scores)
        return torch.full_like(scores, -torch.inf).index_fill(1, token[None], 0.0)


class Clock(LogitsProcessor):
    """Reads the time after the steps that are given."""

    def __init__(self, at: tuple[int, int]) -> None:
        self.at, self.step = at, 0
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.step in self.at:
            if scores.is_cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
        return scores


def generate(
    model: PreTrainedModel, ids: Tensor, new: int, compiled: CompileConfig | None, watch: LogitsProcessor
) -> Any:
    """`new` tokens after the prompt `ids` `[1, T]`; compiled with a static cache, or eager with an ordinary one."""
    static = {"cache_implementation": "static", "compile_config": compiled} if compiled else {}
    return model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([watch]),
        **static,
    )


def start_over(model: PreTrainedModel) -> None:
    """Forget compiled code: the next is compiled for the model as it is now."""
    torch._dynamo.reset()
    model.__dict__.pop("_compiled_call", None)


def graphs() -> int:
    """Graphs compiled so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check(model: PreTrainedModel, ids: Tensor, compiled: CompileConfig) -> float:
    """Largest relative difference of a step's logits, compiled from eager, `|a - b| / |b|`.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    prompt, tokens = ids[:, :-CHECKED], ids[0, -CHECKED:]
    logits = []
    for config in (compiled, None):
        follow = Follow(tokens)
        generate(model, prompt, CHECKED, config, follow)
        logits.append(torch.cat(follow.logits).double())
    difference = float(((logits[0] - logits[1]).norm(dim=-1) / logits[1].norm(dim=-1)).max())
    if not difference <= ALLOWED:
        sys.exit(f"compiled and eager steps differ by {difference}, more than {ALLOWED}: nothing measured")
    return difference


def measure(
    model: PreTrainedModel, ids: Tensor, new: int, compiled: CompileConfig | None, repeats: int
) -> dict[str, Any]:
    """Tokens per second over the steps of a run, after one run to warm up, and the bytes the cache ends with."""
    speeds, before, first = [], graphs(), 0
    for run in range(repeats + 1):
        clock = Clock((SKIPPED, new))
        cache = cache_of(generate(model, ids, new, compiled, clock))
        if run == 0:
            first = graphs() - before
        else:
            speeds.append((new - SKIPPED) / (clock.times[1] - clock.times[0]))
    return {
        "tokens_per_second": statistics.median(speeds),
        "runs": speeds,
        "kv_bytes": kv_bytes(cache),  # a dense cache grows, the others are the same all the time: the peak is the end
        "graphs_compiled": first,
        "recompiles": graphs() - before - first,
    }


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    folder = CHECKPOINT if options.model == BASE_NAME else options.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]
    model.generation_config.eos_token_id = None  # every run has the same number of steps
    budget = SparseKConfig(k=options.k, window=options.window, sinks=options.sinks)
    longest = max(options.lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, longest), generator=generator).to(device)
    distinct = torch.randperm(model.config.vocab_size, generator=generator)[None, : 4 * budget.slots].to(device)
    compiled = CompileConfig(fullgraph=True, backend=options.backend)
    if options.backend != "inductor" or device.type == "cpu":
        compiled.mode = None  # type: ignore[assignment]  # CUDA graphs are inductor's
    compiled._compile_all_devices = True  # type: ignore[assignment]

    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "decode",
        "settings": {
            "model": Path(options.model).name,
            "batch": 1,
            "new_tokens": options.new_tokens,
            "k": options.k,
            "window": options.window,
            "sinks": options.sinks,
            "device": device.type,
            "dtype": options.dtype,
            "backend": options.backend,
            "mode": compiled.mode,
            "trained_positions": model.config.max_position_embeddings,
        },
        "difference_of_compiled": {},
        "rows": [],
        **describe(),
    }
    for attention in ("dense", "sparse"):
        start_over(model)
        if attention == "sparse":
            patch(model, budget)
        result["difference_of_compiled"][attention] = check(model, distinct, compiled)
        if attention == "sparse":
            unpatch(model)
    model.to(dtype)
    for attention in ("dense", "sparse"):
        start_over(model)
        if attention == "sparse":
            patch(model, budget)
        for config in (None, compiled):
            for length in sorted(options.lengths):
                row = {"attention": attention, "decoding": "compiled" if config else "eager", "prompt_tokens": length}
                row |= measure(model, ids[:, :length], options.new_tokens, config, options.repeats)
                result["rows"].append(row)
                print(
                    f"{attention:6}  {row['decoding']:8}  {length:6} tokens  {row['tokens_per_second']:9.1f} tokens/s  "
                    f"{row['kv_bytes']:12,} KV bytes  {row['graphs_compiled']} graphs, {row['recompiles']} recompiles",
                    flush=True,
                )
    return result


def failures(result: dict[str, Any]) -> list[str]:
    """What was promised and did not come true."""
    sparse = [row for row in result["rows"] if row["attention"] == "sparse"]
    sizes = [row["kv_bytes"] for row in sparse]
    found = []
    if max(sizes) > 1.01 * min(sizes):
        found.append(f"the sparse cache grew from {min(sizes):,} to {max(sizes):,} bytes")
    if any(row["recompiles"] for row in sparse):
        found.append("sparse steps were compiled again")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=BASE_NAME, help="a folder, or 'demo' for the bundled checkpoint")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 32768], help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--k", type=int, default=124)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    if options.new_tokens <= SKIPPED or min(options.lengths) <= options.sinks + options.window + options.k:
        parser.error(f"more than {SKIPPED} new tokens are needed, and prompts longer than sinks + window + k")
    result = benchmark(options)
    if options.output:
        write_json(options.output, result)
    if found := failures(result):
        sys.exit("; ".join(found))


if __name__ == "__main__":
    main()
