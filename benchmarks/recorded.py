"""How fast `generate` decodes by recorded steps (`hf_sparse.CapturedDecoding`), and by its own loop, dense and sparse.

    python benchmarks/recorded.py --output recorded.json

Models have the shapes of `benchmarks/generate.py`, random weights and greedy texts that never end. Calls alternate in
one process. A step takes the difference of two calls of `FEW` and `MANY` new tokens, divided by the difference: what a
call takes once, the prompt included, is in neither; each number is the median of several. The share of the roofline is
the time to read all weights of a step and all KV slots once, at the bandwidth of a large copy in the same run, over
the time of a step. The first call of recorded steps includes a prompt of 512 tokens; kernels that earlier shapes have
compiled are not compiled again.

First, on two layers in float32: recorded steps choose the tokens of the ordinary loop; without agreement nothing is
measured. The JSON is written after every cell.
"""

import argparse
import gc
import statistics
import sys
import time
from typing import Any

import torch
from generate import add_options, make_models  # beside this file
from llamas import SHAPES
from measuring import copy_bandwidth, current_commit, wait
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse import CapturedDecoding
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe

FEW, MANY = 9, 73  # new tokens of the two calls


def generate(model: PreTrainedModel, ids: Tensor, new: int, decode: CapturedDecoding | None) -> tuple[float, Tensor]:
    """Return the seconds of a call, and the new tokens."""
    wait(ids.device.type)
    begin = time.perf_counter()
    loop: dict[str, Any] = {"custom_generate": decode} if decode else {}
    found = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **loop
    )
    wait(ids.device.type)
    return time.perf_counter() - begin, found[:, ids.shape[1] :]


def time_step(model: PreTrainedModel, ids: Tensor, decode: CapturedDecoding | None) -> float:
    """Return the milliseconds of a step, from two calls that differ in their new tokens alone."""
    few, many = (generate(model, ids, new, decode)[0] for new in (FEW, MANY))
    return 1e3 * (many - few) / (MANY - FEW)


def draw(model: PreTrainedModel, prompt: int, batch: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)


def check(options: argparse.Namespace) -> float:
    """Return the share of tokens that recorded steps choose as the ordinary loop does.

    Raises:
        SystemExit: it is not 1.
    """
    model = make_models(SHAPES["smollm2"] | {"num_hidden_layers": 2}, options, torch.float32)["sparse"]
    ids = draw(model, options.k + options.window, 2)
    (_, plain), (_, recorded) = (generate(model, ids, 64, loop) for loop in (None, CapturedDecoding(model)))
    equal = float((plain == recorded).float().mean())
    if equal < 1:
        sys.exit(f"recorded steps choose {equal:.3f} of the tokens as the ordinary loop does: nothing measured")
    return equal


def bytes_read(model: PreTrainedModel, batch: int, options: argparse.Namespace) -> int:
    """Count the bytes of all weights that a step reads, and of all KV slots."""
    config, size = model.config, model.dtype.itemsize
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # a step reads few rows of it
    dim = config.hidden_size // config.num_attention_heads
    slots = options.k + options.window + options.sinks
    kept = 2 * batch * config.num_hidden_layers * config.num_key_value_heads * slots * dim
    return size * (sum(parameter.numel() for parameter in model.parameters()) - table + kept)


def measure(
    models: dict[str, PreTrainedModel],
    loops: dict[str, CapturedDecoding],
    prompt: int,
    batch: int,
    rounds: int,
    only_recorded: bool,
) -> dict[str, Any]:
    """Return the milliseconds of a step, by variant, from calls that alternate."""
    ids = draw(models["sparse"], prompt, batch)
    variants = [*loops] if only_recorded else [*models, *loops]
    steps: dict[str, list[float]] = {name: [] for name in variants}
    for name in variants:  # the first prompt of a length may compile kernels
        generate(models.get(name, models["sparse"]), ids, FEW, loops.get(name))
    for _ in range(rounds):
        for name in variants:
            steps[name].append(time_step(models.get(name, models["sparse"]), ids, loops.get(name)))
    return {name: {"step_ms": statistics.median(times), "steps_ms": times} for name, times in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 8192], help="tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--compiled", nargs="*", choices=list(SHAPES), default=["llama-8b"], help="compile these too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-recorded", action="store_true", help="leave out the loop of generate")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no cell begins")
    add_options(parser)
    options = parser.parse_args()
    options.method, options.fitted, options.new_tokens = "sparsek", 0, MANY  # for `make_models`
    clock = time.monotonic()
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "recorded",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in ("k", "window", "sinks", "dtype", "rounds", "tiny")},
        "equal_tokens": check(options),
        "bandwidth": copy_bandwidth(options.device),
        "rows": [],
        **describe(),
    }
    print(f"equal tokens {result['equal_tokens']}, copy {result['bandwidth'] / 1e12:.2f} TB/s", flush=True)
    for shape in options.shapes:
        models = make_models(SHAPES[shape], options, getattr(torch, options.dtype))
        if options.only_recorded:
            del models["dense"]
            gc.collect()
        for batch in options.batches:
            if time.monotonic() - clock > options.deadline:
                break
            loops = {"recorded": CapturedDecoding(models["sparse"])}
            if shape in options.compiled:
                loops["recorded compiled"] = CapturedDecoding(models["sparse"], compiled=True)
            ids = draw(models["sparse"], 512, batch)
            first = {name: generate(models["sparse"], ids, 5, loop)[0] for name, loop in loops.items()}
            ideal = 1e3 * bytes_read(models["sparse"], batch, options) / result["bandwidth"]
            for prompt in options.prompts:
                times = measure(models, loops, prompt, batch, options.rounds, options.only_recorded)
                row = {"shape": shape, "prompt": prompt, "batch": batch, "ideal_ms": ideal, "first_call_s": first}
                result["rows"].append(row | times)
                told = "  ".join(f"{name} {times[name]['step_ms']:.2f}" for name in times)
                print(f"{shape:9} {prompt:6} x {batch}  {told} ms, ideal {ideal:.2f}, first {first}", flush=True)
                if options.output:
                    write_json(options.output, result)
            torch.compiler.reset()
        del models
        gc.collect()


if __name__ == "__main__":
    main()
