"""How long `eval` takes with every selection, and each baseline whose scores follow the attention.

    python benchmarks/evaluation.py --output evaluation.json

The model is random and has TinyLlama's shape; neither time nor memory depends on the weights. `forward` times the
forward without a cache of every contender, in calls that alternate in one process, median of several. The baselines
`h2o`, `tova` and `snapkv` are also measured in the general way, which rows with padding need, with as many chunks at a
time as eval took before it knew the short way. First, both ways have to keep the same keys of a short text, or nothing
is measured. `whole` is one call of `hf_sparse.evaluation.evaluate`: every contender, all budgets, and the speed of
decoding.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llamas import SHAPES, make_llama  # beside this file
from measuring import current_commit, wait
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.evaluation import evaluate, evaluation_of, using
from hf_sparse.methods.sparsek import in_blocks
from hf_sparse.methods.sparsek.baselines import BASELINES, AdaptiveBaseline

GENERAL = mock.patch.object(in_blocks, "_is_plain_text", lambda *_: False)
ADAPTIVE = [name for name, baseline in BASELINES.items() if isinstance(baseline, AdaptiveBaseline)]
CHECKED = 3  # times as many tokens as slots


def make_model(options: argparse.Namespace) -> PreTrainedModel:
    """A patched Llama with random weights."""
    how: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "device": options.device, "tiny": options.tiny}
    model = make_llama(SHAPES[options.shape], options.length, **how)
    return patch(model, SparseKConfig(k=options.k, window=options.window, sinks=options.sinks))


@torch.no_grad()
def check(model: PreTrainedModel, ids: Tensor) -> dict[str, int]:
    """Slots that hold other keys in the general way, of the first layer, whose input is the same in both.

    Raises:
        SystemExit: more than one in a thousand.
    """
    different = {}
    for name in ("h2o", "tova"):  # the third attends to a prompt densely
        held = []
        for general in (False, True):
            with using(model, name), GENERAL if general else mock.MagicMock():
                layer: Any = cache_of(model(ids, use_cache=True)).layers[0]
            held.append(layer.ordered()[3])
        different[name] = int((held[0] != held[1]).sum())
        if different[name] > held[0].numel() / 1000:
            sys.exit(f"{name} keeps {different[name]} other keys in the general way: nothing measured")
    return different


@torch.no_grad()
def forwards(model: PreTrainedModel, chunks: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per chunk of every contender's forward; of the adaptive baselines also in the general way."""
    evaluation = evaluation_of(model)
    at_once = min(len(chunks), evaluation.batch_size(model, options.length))
    variants = [(name, False, at_once) for name in evaluation.contenders(model)]
    variants += [(name, True, min(at_once, options.general_batch)) for name in ADAPTIVE]
    times: dict[tuple[str, bool, int], list[float]] = {variant: [] for variant in variants}
    for number in range(1 + options.rounds):
        for variant in variants:
            name, general, batch = variant
            if general and number > options.general_rounds:
                continue
            with using(model, name), GENERAL if general else mock.MagicMock():
                wait(options.device)
                begin = time.perf_counter()
                model(chunks[:batch], use_cache=False, logits_to_keep=1)
                wait(options.device)
            times[variant].append((time.perf_counter() - begin) / batch)
            print(f"{name:16} general {general!s:5} x {batch}: {times[variant][-1]:.3f} s per chunk", flush=True)
    return [
        {"contender": name, "general": general, "batch": batch, "seconds_per_chunk": statistics.median(seconds[-3:])}
        for (name, general, batch), seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--slots", type=int, nargs="*", default=[128, 512], help="further budgets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--general-rounds", type=int, default=1, help="count calls of the general way after the first")
    parser.add_argument("--general-batch", type=int, default=1, help="chunks at a time in the general way")
    parser.add_argument("--k", type=int, default=124)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a trial")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    named = ("shape", "chunks", "length", "slots", "rounds", "k", "window", "sinks", "device", "dtype", "tiny")
    model = make_model(options)
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randint(0, model.config.vocab_size, (options.chunks, options.length), generator=generator)
    slots = options.k + options.window + options.sinks
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "evaluation",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in named} | {"layers": model.config.num_hidden_layers},
        "other_keys": check(model, chunks[:1, : CHECKED * slots].to(options.device)),
        **describe(),
    }
    print(f"keys that differ between the two ways: {result['other_keys']}", flush=True)
    batch = evaluation_of(model).batch_size(model, options.length)
    begin = time.perf_counter()
    evaluate(model, chunks, slots=options.slots, batch_size=batch, progress=False)
    seconds = time.perf_counter() - begin
    result["whole"] = {"seconds": seconds, "batch": batch, "budgets": 1 + len(options.slots)}
    print(f"evaluate: {seconds:.1f} s", flush=True)
    if options.output:
        write_json(options.output, result)
    result["rows"] = forwards(model, chunks.to(options.device), options)
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
