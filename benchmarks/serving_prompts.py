"""How fast vLLM reads many short prompts at once on the CPU: side by side, and one after another.

    python benchmarks/serving_prompts.py --output serving_prompts-cpu.json

In the environment of `make serving`. All prompts are handed over at once, on the bundled Llama with its adapter's
scorers and two budgets: 64 KV slots of every head, which most of the prompts exceed, and so many that all fit. Each
round reads them once in each way, in turn, and generates one token for each. The operations are those that PyTorch
dispatches, views left out, in the attention of one layer in the step with the most prompts: on a GPU each is a launch,
or several, where no kernel of hf-sparse takes its place. The tokens of both ways have to be the same. The JSON is
written after each budget.

Seconds are those that the process computes, in one thread: others may share the machine.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import vllm
from measuring import current_commit  # beside this file
from serving_adapter import with_equal_heads
from serving_vllm import register_classes
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import LLM, SamplingParams

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.serving import pool
from hf_sparse.serving.export import export
from hf_sparse.serving.vllm import layer

WAYS = ("together", "one by one")


class Operations(TorchDispatchMode):
    """Counts the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        self.count += not any(result.alias_info and not result.alias_info.is_write for result in results)
        return func(*args, **(kwargs or {}))


@contextmanager
def reading(way: str, counts: dict[int, int] | None = None) -> Iterator[None]:
    """Let the pool read prompts in one of the ways, and note the operations by the number of prompts in a step."""
    groups_of, attend_packed = pool.groups_of, layer.attend_packed

    def counted(attention: Any, states: Any, batch: Any, *tensors: Any) -> Any:
        with Operations() as operations:
            result = attend_packed(attention, states, batch, *tensors)
        assert counts is not None
        counts[len(batch.chunks)] = operations.count  # of the last layer, which makes no tables of groups
        return result

    if way == "one by one":
        pool.groups_of = lambda chunks, *options: iter([[number] for number in range(len(chunks))])
    if counts is not None:
        layer.attend_packed = counted  # type: ignore[assignment]
    try:
        yield
    finally:
        pool.groups_of, layer.attend_packed = groups_of, attend_packed


def measure(args: argparse.Namespace, slots: int, folder: Path) -> dict[str, Any]:
    """Read the prompts in both ways with an adapter of so many slots."""
    config = json.loads((args.adapter / "adapter_config.json").read_text("utf-8"))
    k = slots - config["window"] - config["sinks"]
    export(with_equal_heads(args.adapter, folder / "adapter", k=k), folder / "served")
    register_classes("HfSparseLlamaForCausalLM")
    engine = LLM(
        str(folder / "served"),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=args.prompts,
        max_num_batched_tokens=args.batched_tokens,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    generator = random.Random(0)
    lengths = [generator.randint(args.shortest, args.longest) for _ in range(args.prompts)]
    prompts: Any = [{"prompt_token_ids": [generator.randrange(4, 4096) for _ in range(n)]} for n in lengths]
    parameters = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)

    def read() -> list[int]:
        return [output.outputs[0].token_ids[0] for output in engine.generate(prompts, parameters, use_tqdm=False)]

    counts: dict[str, dict[int, int]] = {way: {} for way in WAYS}
    tokens: dict[str, list[int]] = {}
    for way in WAYS:
        with reading(way, counts[way]):
            tokens[way] = read()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS if number % 2 else WAYS[::-1]:
            with reading(way):
                began = time.process_time()
                read()
                seconds[way].append(time.process_time() - began)
    most = max(counts["together"])
    return {
        "slots": slots,
        "prompts": args.prompts,
        "prompt_tokens": sum(lengths),
        "prompts_that_fit_into_the_slots": sum(length <= slots for length in lengths),
        "same_tokens": tokens["together"] == tokens["one by one"],
        "prompts_in_a_step": most,
        "operations_of_a_layer": {way: counts[way][most] for way in WAYS},
        "tokens_per_second": {way: sum(lengths) / statistics.median(seconds[way]) for way in WAYS},
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("model_cards/demo-llama-sparsek-64"))
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=20, help="tokens of a prompt")
    parser.add_argument("--longest", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="of a forward")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": {**describe(), "vllm": vllm.__version__},
        "threads": torch.get_num_threads(),
        "commit": args.commit or current_commit(),
        "budgets": [],
    }
    for slots in args.slots:
        with tempfile.TemporaryDirectory() as folder:
            budget = measure(args, slots, Path(folder))
        result["budgets"].append(budget)
        print({name: value for name, value in budget.items() if name != "seconds"}, flush=True)
        write_json(args.output, result)


if __name__ == "__main__":
    main()
