"""Measure the training of scorers at long texts: tokens per second, memory, hours for 20 M tokens.

    python benchmarks/finetune_length.py --output finetune_length.json

Llamas of two shapes with random weights in bfloat16 are trained by `hf_sparse.finetune.finetune`, as a user would, on
random tokens, one chunk a step. `distill` has the teacher's forward in every step, `lm` has none. The teacher is dense,
or attends within a window (`FinetuneConfig.teacher_window`). The figures are those of finetune.json: the median of the
steps but the first, which compiles kernels, and the peak of the whole run.
`--precision no fp8` measures every row in both, one after the other; `no` is bfloat16. Rows that are `compiled` have
their MLPs and norms compiled by torch.compile before. A row `step_ms` tells how long one step of the 8B shape takes and
which kernels it spends that on. A row that does not fit, or fails, is recorded as such.
The JSON is written after every row, most important rows first, and `--deadline` ends a run between two rows.
"""

import argparse
import gc
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import profiles as kernels  # beside this file
import torch
from llamas import LLAMA_1B, LLAMA_8B
from measuring import current_commit
from model import budget, make_model
from transformers import PreTrainedModel

from hf_sparse import patch
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.config import Precision
from hf_sparse.finetune.objectives import dense_within, distill
from hf_sparse.finetune.peak import share_of_peak
from hf_sparse.finetune.predictions import predict
from hf_sparse.patches import sparse_layers_in_use

SHAPES = {"8B": LLAMA_8B, "1B": LLAMA_1B}

#: Shape, tokens, objective, whether layers run again in the backward, steps, whether parts are compiled, and the window
#: of the teacher, 0 for a dense one.
ROWS = [
    ("8B", 8_192, "distill", False, 6, False, 0),
    ("8B", 8_192, "lm", True, 4, False, 0),
    ("8B", 32_768, "lm", True, 3, False, 0),
    ("8B", 32_768, "distill", True, 2, False, 0),
    ("8B", 8_192, "profile", False, 1, False, 0),
    ("1B", 131_072, "distill", True, 2, False, 0),
    ("8B", 8_192, "distill", False, 6, True, 0),
    ("1B", 131_072, "lm", True, 2, False, 0),
    ("8B", 8_192, "lm", False, 4, False, 0),
    ("8B", 8_192, "distill", True, 4, False, 0),
    ("1B", 8_192, "distill", False, 6, False, 0),
    ("1B", 131_072, "distill", True, 2, False, 2_048),
    ("8B", 32_768, "distill", True, 2, False, 2_048),
    ("8B", 32_768, "profile", False, 1, False, 2_048),
]
TOKENS = 20e6


def measure(
    model: PreTrainedModel, tokens: int, objective: str, recomputed: bool, steps: int, precision: Precision, window: int
) -> dict[str, Any]:
    """Return the figures of a short run, whose teacher attends within a window if that is not 0."""
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randint(0, model.config.vocab_size, (steps, tokens), generator=generator)
    cuda = next(model.parameters()).is_cuda
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {"objective": objective, "steps": steps, "warm_start_steps": 0, "batch_size": 1}
    settings: dict[str, Any] = {"divide_heads": False, "cpu": not cuda, "progress": False, "mixed_precision": precision}
    settings["teacher_window"] = window
    config = FinetuneConfig(**options, gradient_checkpointing=recomputed, **settings)
    metrics = finetune(model, chunks, config)
    speed = statistics.median(row["tokens_per_second"] for row in metrics["history"][1:])
    name = torch.cuda.get_device_name() if cuda else "cpu"
    return {
        "tokens_per_second": speed,
        "hours_for_20M_tokens": TOKENS / speed / 3600,
        "share_of_peak": share_of_peak(model, objective, speed, name),
        "peak_memory_bytes": metrics.get("peak_memory_bytes"),
        "first_step_s": tokens / metrics["history"][0]["tokens_per_second"],
        "losses": [row["loss"] for row in metrics["history"]],
    }


def profile_step(model: PreTrainedModel, tokens: int, window: int) -> dict[str, Any]:
    """Return how long one step takes, its teacher, and the kernels of it, without the optimiser."""
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator).to(model.device)
    for layer in sparse_layers_in_use(model):
        layer.train()
    learned = [parameter for name, parameter in model.named_parameters() if "sparsek_scorer" in name]
    for parameter in learned:
        parameter.requires_grad_(True)

    def teacher() -> None:
        with torch.no_grad(), dense_within(model, tokens, window):
            predict(model, chunk, use_cache=False)

    def student() -> None:
        with torch.no_grad():
            predict(model, chunk, use_cache=False)

    def loss() -> torch.Tensor:
        return distill(model, chunk, teacher_window=window)

    row: dict[str, Any] = {}
    for name, run in (("teacher_ms", teacher), ("student_forward_ms", student)):
        row[name] = kernels.measure(run, model.device.type, profiled=False)["call_ms"]
    step = kernels.measure(lambda: torch.autograd.grad(loss(), learned), model.device.type)
    model.eval()
    return row | {"step_ms": step.pop("call_ms"), **step}


def compile_parts(model: PreTrainedModel) -> None:
    """Compile the MLP and the norms of every layer, as any program can before it calls `finetune`."""
    for layer in model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.forward = torch.compile(part.forward, dynamic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rows", type=int, nargs="*", default=list(range(len(ROWS))), help="numbers of rows")
    parser.add_argument("--precision", nargs="*", default=["no"], choices=get_args(Precision), help="of accelerate")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to try the script out")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no row begins")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    began = time.perf_counter()
    # What `model.py` builds its model and budget from.
    options.contexts, options.steps = [max(tokens for _, tokens, *_ in ROWS)], 0
    options.k, options.window, options.sinks = (12, 16, 4) if options.tiny else (508, 512, 4)
    result: dict[str, Any] = {"format": 1, "benchmark": "finetune_length", "commit": options.commit or current_commit()}
    result |= {**describe(), "slots": budget(options).slots, "rows": []}
    model, made = None, None
    for number, precision in itertools.product(options.rows, options.precision):
        shape, tokens, objective, recomputed, steps, compiled, window = ROWS[number]
        if time.perf_counter() - began > options.deadline:
            break
        if made != (shape, compiled):
            model = None
            gc.collect()
            dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
            model, made = make_model(options, SHAPES[shape], dtype), (shape, compiled)
            model.requires_grad_(False)
            patch(model, budget(options))
            if compiled:
                compile_parts(model)
        assert model is not None
        length, window = (96, min(window, 16)) if options.tiny else (tokens, window)
        row = {"shape": shape, "tokens": length, "objective": objective, "gradient_checkpointing": recomputed}
        row |= {"compiled": compiled, "mixed_precision": precision}
        row |= {"teacher_window": window} if window else {}
        try:
            if objective == "profile":
                row |= profile_step(model, length, window)
            else:
                row |= measure(model, length, objective, recomputed, steps, precision, window)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        told = {name: value for name, value in row.items() if name != "kernels"}
        print(f"{time.perf_counter() - began:.0f} s: {told}", flush=True)
        for kernel in row.get("kernels", []):
            print(f"    {kernel['ms']:8.2f} ms {kernel['launches']:5} {kernel['name'][:110]}", flush=True)
        result["rows"].append(row)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
