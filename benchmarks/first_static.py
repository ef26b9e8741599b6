"""How long compiled `generate` waits for its first tokens, and for those of prompts of other lengths.

    python benchmarks/first_static.py --output first_static.json

Every way has a process of its own, one after the other, with empty caches of compiled code: dense and sparse attention
with `cache_implementation="static"`, recorded steps (`hf_sparse.CapturedDecoding`), which compile kernels only, and
default `generate`. The model has random weights. With `--head-shares` its KV heads select different numbers of keys, in
every layer others, as in an adapter that `finetune` has divided. In each process: one token (the prompt alone), a first
call, a first longer one, the same again, and ten prompts of different lengths (`--calls first` ends after the first
call; `--whole` leaves out the call of one token, so that the first call reads a first prompt too, as a user's does).
After each call its seconds are printed with the parts of it that are known, and the JSON is written, so that a run that
is cut is not lost: tracing in Python, the passes of autograd, lowering, the wait for the kernels of inductor, and the
kernels of Triton, side by side, with the seconds from the beginning of the first to the end of the last one and the sum
of all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llamas import SHAPES, draw_shares, make_llama  # beside this file
from measuring import current_commit
from torch._dynamo.utils import compilation_time_metrics, counters

from hf_sparse import CapturedDecoding, SparseKConfig, patch
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe

WAYS = ("dense static", "sparse static", "sparse recorded", "sparse recorded compiled", "sparse default")
# All of torch.compile, and parts of it: tracing, autograd's tracing with lowering, lowering, its wait for Triton.
PHASES = (
    "_compile.compile_inner",
    "bytecode_tracing",
    "create_aot_dispatcher_function",
    "compile_fx_inner",
    "async_compile.wait",
)
CALLS = {"prompt": 1, "first": 8, "longer": 64, "again": 64}  # new tokens
LENGTHS = (100, 300, 777, 900, 1024, 1300, 2000, 2500, 3333, 5000)


def graphs() -> int:
    """Count the graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def phases() -> dict[str, float]:
    """Return the seconds that torch.compile has spent in this process, by part."""
    return {name: sum(compilation_time_metrics.get(name, [])) for name in PHASES}


class Kernels:
    """Note when Triton compiles kernels in this process."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        if torch.cuda.is_available():
            from triton import knobs

            knobs.compilation.listener = self.note

    def note(self, *, times: Any, cache_hit: bool, **rest: Any) -> None:
        """Note a kernel that was compiled; Triton calls this."""
        if not cache_hit:
            end = time.perf_counter()
            self.spans.append((end - times.total / 1e6, end))

    def take(self) -> dict[str, float]:
        """Return number, seconds from the first to the last and sum of seconds of the kernels since the last call."""
        spans, self.spans = self.spans, []
        whole = max(end for _, end in spans) - min(begin for begin, _ in spans) if spans else 0.0
        return {"kernels": len(spans), "kernels_s": whole, "kernels_sum_s": sum(end - begin for begin, end in spans)}


def measure(way: str, options: argparse.Namespace) -> None:
    """Print the seconds of the calls so far as JSON after each call, in a fresh process."""
    where: dict[str, Any] = {"device": options.device, "tiny": options.tiny}
    model: Any = make_llama(SHAPES[options.shape], 8192, dtype=torch.bfloat16, **where)
    config = model.config
    how: dict[str, Any] = {} if way.endswith("default") else {"cache_implementation": "static"}
    if way.startswith("sparse"):
        shares = draw_shares(config) if options.head_shares else None
        patch(model, SparseKConfig(k=options.k, window=options.window, sinks=options.sinks, head_shares=shares))
    if "recorded" in way:
        how = {"custom_generate": CapturedDecoding(model, compiled=way.endswith("compiled"))}

    def seconds(length: int, new: int) -> float:
        ids = torch.randint(0, config.vocab_size, (1, length), device=options.device)
        begin = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **how).tolist()
        return time.perf_counter() - begin

    kernels = Kernels()
    row: dict[str, Any] = {"way": way, "calls_s": {}, "parts_s": {}}
    calls = {name: new for name, new in CALLS.items() if not (options.whole and name == "prompt")}
    for name, new in calls.items():
        before = phases()
        row["calls_s"][name] = seconds(1500, new)
        spent = {part: value - before[part] for part, value in phases().items()}
        row["parts_s"][name] = spent | kernels.take()
        row |= {"phases_s": phases(), "graphs": graphs()}
        print(json.dumps(row), flush=True)
        if name == options.calls:
            return
    row["lengths_s"] = {str(length): seconds(length, 8) for length in LENGTHS}
    row["more_graphs"] = graphs() - row["graphs"]
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--calls", choices=[*CALLS, "all"], default="all", help="the last one, or the lengths too")
    parser.add_argument("--whole", action="store_true", help="begin with a call of a prompt and steps")
    parser.add_argument("--way", choices=WAYS, help="measure it in this process and print JSON")
    parser.add_argument("--k", type=int, default=508)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--head-shares", action="store_true", help="other numbers of keys for every KV head")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a trial")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    if options.way:
        measure(options.way, options)
        return
    settings = {
        name: getattr(options, name) for name in ("shape", "k", "window", "sinks", "head_shares", "whole", "tiny")
    }
    result: dict[str, Any] = {"format": 1, "benchmark": "first_static", "settings": settings, "rows": [], **describe()}
    result["commit"] = options.commit or current_commit()
    result["cores"] = len(os.sched_getaffinity(0))
    for way in options.ways:
        with tempfile.TemporaryDirectory() as empty:
            caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            process = subprocess.Popen(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True)
            rows, count = result["rows"], len(result["rows"])
            assert process.stdout is not None
            for line in process.stdout:
                rows[count:] = [json.loads(line)]
                print(rows[-1], flush=True)
                if options.output:
                    write_json(options.output, result)
        if process.wait():
            sys.exit(f"{way}: broke off, exit status {process.returncode}")


if __name__ == "__main__":
    main()
