"""A text without end in constant memory: 100,000 tokens from one cache of fixed size.

    python benchmarks/streaming.py --output streaming.json

The patched checkpoint samples its own continuation, token by token, from one `SparseKCache`. On the way the bytes of
keys and values and the memory of the process are recorded. The scorers are not trained, and positions leave the range
that the model was trained on: with `--positions grow` they go on counting, with `--positions stay` every token past the
range stands at its last position. Which of the two, if any, a model can bear is for its user to find out; this measures
memory and time, not text.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_sparse import SparseKCache, SparseKConfig, patch
from hf_sparse._compat import with_cache
from hf_sparse.atomic_files import write_json
from hf_sparse.demo import BASE_NAME, CHECKPOINT
from hf_sparse.environment import describe


def memory(device: torch.device) -> dict[str, int]:
    """Bytes: the peak of the process, and on a GPU what is allocated there and its peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        found |= {"allocated": torch.cuda.memory_allocated(), "peak_allocated": torch.cuda.max_memory_allocated()}
    return found


@torch.no_grad()
def stream(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(options.device)
    folder = CHECKPOINT if options.model == BASE_NAME else options.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to(device).eval()  # type: ignore[arg-type]
    patch(model, SparseKConfig(k=options.k, window=options.window, sinks=options.sinks))
    trained = model.config.max_position_embeddings
    cache = SparseKCache(model)
    forward = torch.compile(model, fullgraph=True, mode="reduce-overhead") if options.compile else model

    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # Two tokens, so that the cache's buffers are there before anything is compiled.
    model(token.expand(1, 2), **with_cache(cache))
    position = torch.full((1, 1), 2, device=device)
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for count in range(1, options.tokens + 1):
        at = position.clamp(max=trained - 1) if options.positions == "stay" else position
        logits = forward(token, position_ids=at, **with_cache(cache)).logits[:, -1].float()
        token = torch.multinomial(logits.softmax(-1), 1)
        position = position + 1
        if count % max(1, options.tokens // options.readings) == 0:
            if not bool(logits.isfinite().all()):
                sys.exit(f"the logits of token {count} are not finite")
            row = {"tokens": count, "seconds": time.perf_counter() - begin, "kv_bytes": cache.nbytes, **memory(device)}
            rows.append(row)
            print("  ".join(f"{name} {value:,.0f}" for name, value in row.items()), flush=True)
    return {
        "format": 1,
        "benchmark": "streaming",
        "settings": {
            "model": Path(options.model).name,
            "tokens": options.tokens,
            "k": options.k,
            "window": options.window,
            "sinks": options.sinks,
            "positions": options.positions,
            "trained_positions": trained,
            "device": device.type,
            "dtype": options.dtype,
            "compiled": options.compile,
        },
        "rows": rows,
        # From a fifth of the way on, when allocators have settled.
        "growth": {name: rows[-1][name] - rows[len(rows) // 5][name] for name in rows[0] if name not in _CLOCK},
        **describe(),
    }


_CLOCK = ("tokens", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=BASE_NAME, help="a folder, or 'demo' for the bundled checkpoint")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--readings", type=int, default=20, help="how often memory is recorded")
    parser.add_argument("--positions", default="grow", choices=["grow", "stay"], help="past the trained range")
    parser.add_argument("--k", type=int, default=124)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="compile the decoding step")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    result = stream(options)
    print("growth from a fifth of the way on: " + ", ".join(f"{k} {v:,} bytes" for k, v in result["growth"].items()))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
