"""How long compiled `generate` waits for its first tokens, and for those of prompts of other lengths.

    python benchmarks/first_static.py --output first_static.json

Every way has a process of its own, one after the other, with empty caches of compiled code: dense and sparse attention
with `cache_implementation="static"`, and recorded steps (`hf_sparse.CapturedDecoding`), which compile kernels only. The
model has random weights. In each process: one token (the prompt alone), a first call, a first longer one, the same
again, and ten prompts of different lengths.
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
from attention_kernels import current_commit  # beside this file
from generate import SHAPES
from model import TINY
from torch._dynamo.utils import compilation_time_metrics, counters
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse import CapturedDecoding, SparseKConfig, patch
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe

WAYS = ("dense static", "sparse static", "sparse recorded", "sparse recorded compiled")
PHASES = ("_compile.compile_inner", "compile_fx_inner", "async_compile.wait")  # whole; inductor; its wait for Triton
LENGTHS = (100, 300, 777, 900, 1024, 1300, 2000, 2500, 3333, 5000)


def graphs() -> int:
    """Count the graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of the calls, in a fresh process."""
    shape = SHAPES[options.shape] | (TINY if options.tiny else {})
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(options.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    how: dict[str, Any] = {"cache_implementation": "static"}
    if way.startswith("sparse"):
        patch(model, SparseKConfig(k=options.k, window=options.window, sinks=options.sinks))
    if "recorded" in way:
        how = {"custom_generate": CapturedDecoding(model, compiled=way.endswith("compiled"))}

    def seconds(length: int, new: int) -> float:
        ids = torch.randint(0, config.vocab_size, (1, length), device=options.device)
        begin = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **how).tolist()
        return time.perf_counter() - begin

    calls = {}
    for name, new in (("prompt", 1), ("first", 8), ("longer", 64), ("again", 64)):
        calls[name] = seconds(1500, new)
    phases = {name: sum(compilation_time_metrics.get(name, [])) for name in PHASES}
    before = graphs()
    lengths = {str(length): seconds(length, 8) for length in LENGTHS}
    return {
        "way": way,
        "calls_s": calls,
        "phases_s": phases,
        "graphs": before,
        "lengths_s": lengths,
        "more_graphs": graphs() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, help="measure it in this process and print JSON")
    parser.add_argument("--k", type=int, default=508)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a trial")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    settings = {name: getattr(options, name) for name in ("shape", "k", "window", "sinks", "tiny")}
    result: dict[str, Any] = {"format": 1, "benchmark": "first_static", "settings": settings, "rows": [], **describe()}
    result["commit"] = options.commit or current_commit()
    result["cores"] = len(os.sched_getaffinity(0))
    for way in options.ways:
        with tempfile.TemporaryDirectory() as empty:
            caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            process = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=False)
        if process.returncode:
            sys.exit(f"{way}: no result, exit status {process.returncode}")
        result["rows"].append(json.loads(process.stdout.splitlines()[-1]))
        print(result["rows"][-1], flush=True)
        if options.output:
            write_json(options.output, result)


if __name__ == "__main__":
    main()
