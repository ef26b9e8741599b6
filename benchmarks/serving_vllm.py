"""How fast vLLM serves a decoder of the shape of Llama-3.1-8B, dense or with sparse attention.

    python benchmarks/serving_vllm.py dense --output serving_vllm-dense.json
    python benchmarks/serving_vllm.py sparse --output serving_vllm-sparse.json

Weights are random, and vLLM's own scheduler, sampler and models do all the work. Two things are timed:

- Decoding of many requests at a time that have `--context` tokens behind them: the median time from one step of the
  engine to the next, with all requests in every step. Their prompts are taken for read elsewhere
  (`vllm_read_elsewhere.py`), since to read 700 of them takes a quarter of an hour; the memory holds random numbers.
- Whole requests, with prompts of `--context` tokens that are read: seconds until the first token of each, and until all
  have `--new` tokens.

A GPU decodes in CUDA graphs, without torch.compile, which would take a minute. One process measures one of the two
models, so that each has the whole memory. With `--tensor-parallel-size 2` two processes with a GPU each share the heads
and the weights; what they add up goes through NCCL. The JSON is written after each measurement.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, which times its steps
os.environ["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"  # it would use multicast over NVLink, which not every host allows

import torch
import transformers
import vllm
from measuring import current_commit  # beside this file
from peft import get_peft_model
from serving_pool import add_shape_options
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.plugins import load_general_plugins
from vllm_read_elsewhere import WHOLE

from hf_sparse import SparseKConfig
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.serving.export import export


def make_models(args: argparse.Namespace, folder: Path) -> None:
    """Write the folder that vLLM opens: configurations, and an adapter with random scores. There are no weights."""
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=131072,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder / "base")
    if args.kind == "dense":
        return
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = transformers.AutoModelForCausalLM.from_config(config)
    settings = SparseKConfig(k=args.slots - args.window - args.sinks, window=args.window, sinks=args.sinks)
    model = get_peft_model(base, settings)
    model.active_peft_config.base_model_name_or_path = str(folder / "base")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(folder / "adapter"))
    export(folder / "adapter", folder / "served")


def run_apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, so that none has touched a GPU yet where vLLM forks its processes."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def register_classes(*names: str) -> None:
    """Tell vLLM the classes of models themselves: of a name it would ask another process, which takes half a minute."""
    load_general_plugins()
    for name in names:
        module = "hf_sparse.serving.vllm.models" if name.startswith("HfSparse") else "vllm.model_executor.models.llama"
        ModelRegistry.register_model(name, getattr(import_module(module), name))


def make_engine(args: argparse.Namespace, model: Path) -> Any:
    """Start the engine."""
    register_classes("LlamaForCausalLM", "HfSparseLlamaForCausalLM")
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"enforce_eager": True}
    if on_gpu:
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes(args)}
        options = {"compilation_config": graphs, "gpu_memory_utilization": args.memory}
    engine = LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16" if on_gpu else "float32",
        max_model_len=args.context + 256,
        max_num_seqs=max(sizes(args)),
        max_num_batched_tokens=args.batched_tokens or args.context + 512,
        enable_prefix_caching=False,
        tensor_parallel_size=args.tensor_parallel_size,
        disable_custom_all_reduce=True,
        kv_transfer_config={
            "kv_connector": "ReadElsewhere",
            "kv_connector_module_path": "vllm_read_elsewhere",
            "kv_role": "kv_both",
        },
        **options,
    )
    engine.collective_rpc(fill, args=(args,))
    return engine.llm_engine


def sizes(args: argparse.Namespace) -> list[int]:
    """Numbers of requests of which there are graphs."""
    return sorted({1, *args.requests, *args.whole})


def fill(worker: Any, args: argparse.Namespace) -> None:
    """Fill the memory of one of vLLM's processes with what texts of the length of the context may leave."""
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if not hasattr(layer, "states"):
            for tensor in layer.kv_cache if isinstance(layer.kv_cache, list | tuple) else [layer.kv_cache]:
                tensor.normal_()
            continue
        for part, state in zip(layer.state, layer.states, strict=True):
            if part.name == "positions":
                always = [*range(args.sinks), *range(args.context - args.window, args.context)]
                middle = torch.linspace(args.sinks, args.context - args.window - 1, args.slots - len(always))
                state.copy_(torch.tensor([*always, *middle.long().tolist()], device=state.device).expand_as(state))
            elif part.name == "seen":
                state.fill_(args.context)
            else:
                state.normal_()


def requests_that_fit(args: argparse.Namespace, core: Any) -> int:
    """How many requests have room at a time, by the blocks that vLLM allocated."""
    cache = core.vllm_config.cache_config
    if args.kind == "sparse":
        return cache.num_gpu_blocks - 1
    return (cache.num_gpu_blocks - 1) // -(-(args.context + args.new) // cache.block_size)


def serve(args: argparse.Namespace, core: Any, count: int, whole: bool) -> dict[str, Any]:
    """Time `count` requests that are handed over at once."""
    parameters = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(count)
    prompt = torch.randint(10, args.vocabulary, (args.context,), generator=generator).tolist()
    began = time.perf_counter()
    for number in range(count):
        name = f"{WHOLE if whole else 'decoding'}-{count}-{number}"
        tokens = [*prompt[number:], *prompt[:number]]
        core.add_request(name, {"prompt_token_ids": tokens}, parameters)
    added = time.perf_counter()
    steps: list[float] = []  # when they ended in which all requests were
    first: dict[str, float] = {}
    held: dict[str, int] = {}
    while core.has_unfinished_requests():
        outputs, now = core.step(), time.perf_counter()
        for output in outputs:
            held[output.request_id] = len(output.outputs[0].token_ids)
            first.setdefault(output.request_id, now - began)
        if len(outputs) == count and not any(output.finished for output in outputs):
            steps.append(now)
    ended = time.perf_counter()
    assert len(held) == count and set(held.values()) == {args.new}
    gaps = [after - before for before, after in pairwise(steps[2:])]  # all are decoding by then
    median = statistics.median(gaps)
    return {
        "requests": count,
        "prompts_are_read": whole,
        "new_tokens": args.new,
        "seconds": ended - began,
        "seconds_to_hand_over": added - began,
        "seconds_to_first_tokens": sorted(first.values()),
        "tokens_per_second": count * args.new / (ended - began),
        "step_seconds": median,
        "tokens_per_second_of_steps": count / median,
        "steps": gaps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("dense", "sparse"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--requests", type=int, nargs="+", default=[4, 16, 24, 64, 256, 700], help="that decode")
    parser.add_argument("--whole", type=int, nargs="*", default=[1, 4], help="requests with prompts that are read")
    parser.add_argument("--new", type=int, default=32, help="tokens that each request generates")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the memory of the GPU")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the heads")
    parser.add_argument("--wait-for", type=Path, default=None, help="a file, before the GPU is used")
    parser.add_argument("--batched-tokens", type=int, default=None, help="of a forward; by default a prompt and 512")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=4)
    add_shape_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_apart(make_models, args, Path(folder))
        model = Path(folder) / ("base" if args.kind == "dense" else "served")
        while args.wait_for is not None and not args.wait_for.exists():
            time.sleep(0.2)
        began = time.perf_counter()
        core = make_engine(args, model)
        fits = requests_that_fit(args, core)
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "commit", "wait_for")}
        result: dict[str, Any] = {
            "environment": {**describe(), "vllm": vllm.__version__},
            "commit": args.commit or current_commit(),
            "settings": settings,
            "engine_seconds": time.perf_counter() - began,
            "requests_that_fit": fits,
            "served": [],
        }
        print(f"{args.kind}: engine {result['engine_seconds']:.0f} s, {fits} requests fit", flush=True)
        serve(args, core, min(args.requests), whole=False)  # warms up
        todo = [(count, False) for count in args.requests if count <= fits] + [(count, True) for count in args.whole]
        for number, (count, whole) in enumerate(todo):
            if whole and not todo[number - 1][1]:
                serve(args, core, 1, whole)  # compiles
            served = serve(args, core, count, whole)
            result["served"].append(served)
            print(
                f"{args.kind}, {count} requests, prompts {'read' if whole else 'read elsewhere'}: "
                f"{1000 * served['step_seconds']:.2f} ms a step, {served['tokens_per_second_of_steps']:.0f} tokens/s, "
                f"{served['seconds']:.2f} s in all, {served['seconds_to_hand_over']:.2f} s to hand over, "
                f"last first token after {served['seconds_to_first_tokens'][-1]:.2f} s",
                flush=True,
            )
            write_json(args.output, result)


if __name__ == "__main__":
    main()
