"""Measure the training of scorers at long texts: tokens per second, memory, hours for 20 M tokens.

    python benchmarks/finetune_length.py --output finetune_length.json

Llamas of two shapes with random weights in bfloat16 are trained by `hf_sparse.finetune.finetune`, as a user would, on
random tokens, one chunk a step. `distill` has the dense teacher's forward in every step, `lm` has none. The figures are
those of finetune.json: the median of the steps but the first, which compiles kernels, and the peak of the whole run.
A row that does not fit is recorded as such. The JSON is written after every row, most important rows first.
"""

import argparse
import gc
import statistics
from pathlib import Path
from typing import Any

import torch
from attention_kernels import current_commit  # beside this file
from model import LLAMA_8B, budget, make_model
from transformers import PreTrainedModel

from hf_sparse import patch
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.finetune import FinetuneConfig, finetune

LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128_256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": True,
}
SHAPES = {"8B": LLAMA_8B, "1B": LLAMA_1B}

#: Shape, tokens, objective, whether layers run again in the backward, and steps.
ROWS = [
    ("8B", 8_192, "distill", False, 6),
    ("8B", 8_192, "lm", True, 4),
    ("8B", 32_768, "lm", True, 3),
    ("8B", 32_768, "distill", True, 3),
    ("8B", 8_192, "lm", False, 4),
    ("8B", 8_192, "distill", True, 4),
    ("1B", 131_072, "distill", True, 3),
    ("1B", 131_072, "lm", True, 3),
]
TOKENS = 20e6


def measure(model: PreTrainedModel, tokens: int, objective: str, recomputed: bool, steps: int) -> dict[str, Any]:
    """Return the figures of a short run, or why there is none."""
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randint(0, model.config.vocab_size, (steps, tokens), generator=generator)
    cuda = next(model.parameters()).is_cuda
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {"objective": objective, "steps": steps, "warm_start_steps": 0, "batch_size": 1}
    settings: dict[str, Any] = {"divide_heads": False, "cpu": not cuda, "progress": False}
    config = FinetuneConfig(**options, gradient_checkpointing=recomputed, **settings)
    try:
        metrics = finetune(model, chunks, config)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(".")[0]}
    speed = statistics.median(row["tokens_per_second"] for row in metrics["history"][1:])
    return {
        "tokens_per_second": speed,
        "hours_for_20M_tokens": TOKENS / speed / 3600,
        "peak_memory_bytes": metrics.get("peak_memory_bytes"),
        "first_step_s": tokens / metrics["history"][0]["tokens_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rows", type=int, nargs="*", default=list(range(len(ROWS))), help="numbers of rows")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to try the script out")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    # What `model.py` builds its model and budget from.
    options.contexts, options.steps = [max(tokens for _, tokens, *_ in ROWS)], 0
    options.k, options.window, options.sinks = (12, 16, 4) if options.tiny else (508, 512, 4)
    result: dict[str, Any] = {"format": 1, "benchmark": "finetune_length", "commit": options.commit or current_commit()}
    result |= {**describe(), "slots": budget(options).slots, "rows": []}
    model, made = None, ""
    for number in options.rows:
        shape, tokens, objective, recomputed, steps = ROWS[number]
        if made != shape:
            model = None
            gc.collect()
            dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
            model, made = make_model(options, SHAPES[shape], dtype), shape
            model.requires_grad_(False)
            patch(model, budget(options))
        assert model is not None
        length = 96 if options.tiny else tokens
        row = {"shape": shape, "tokens": length, "objective": objective, "gradient_checkpointing": recomputed}
        row |= measure(model, length, objective, recomputed, steps)
        print(row, flush=True)
        result["rows"].append(row)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
