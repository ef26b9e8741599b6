"""Compare the tokens of vLLM with those of `generate`: greedy, in float32, requests of mixed lengths.

    python benchmarks/serving_equality.py --output serving_equality.json
    python benchmarks/serving_equality.py --tensor-parallel-size 2 --mode prefix --output serving_equality-2.json

All requests are handed over at once, more than are served at a time, so that prompts are read in pieces beside requests
that decode; and then all once more. Several processes get a copy of the adapter with equal heads, since they share the
heads and need as many slots each. Before the first one the memory of all states is filled with NaN. The modes:

    eager   without graphs
    decode  decoding in CUDA graphs
    graphs  vLLM's defaults: torch.compile, piecewise graphs of mixed batches and full ones of decoding
    prefix  decoding in CUDA graphs, with prefix caching: the second time most of each prompt is found in the cache
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import vllm
from measuring import current_commit  # beside this file
from serving_adapter import with_equal_heads
from serving_vllm import register_classes, run_apart
from vllm import LLM, SamplingParams

import hf_sparse
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.serving.export import export

DECODE: dict[str, Any] = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "decode": DECODE,
    "graphs": {},
    "prefix": {**DECODE, "enable_prefix_caching": True},
}


def answer(args: argparse.Namespace, folder: Path) -> None:
    """Write the folder that vLLM opens, and prompts with what `generate` adds to each."""
    adapter = args.adapter
    if args.tensor_parallel_size > 1:
        adapter = with_equal_heads(adapter, folder / "adapter")
    export(adapter, folder / "served")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = hf_sparse.from_pretrained(adapter, dtype=torch.float32).to(device)
    generator = random.Random(6)
    drawn = [int(10 * 150 ** generator.random()) for _ in range(args.requests - 6)]
    answers = []
    for length in [10, 1500, 64, 65, *drawn, 1, 1]:
        prompt = [generator.randrange(4, model.config.vocab_size) for _ in range(length)]
        with torch.no_grad():
            tokens = model.generate(
                input_ids=torch.tensor([prompt], device=device),
                max_new_tokens=args.new,
                do_sample=False,
                eos_token_id=None,
            )
        answers.append({"prompt": prompt, "tokens": tokens[0, length:].tolist()})
    (folder / "answers.json").write_text(json.dumps(answers))


def poison(worker: Any) -> None:
    """Fill the memory of all states in one of vLLM's processes with NaN and numbers below 0."""
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        for page in layer.pages:
            page.fill_(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("model_cards/demo-llama-sparsek-64"))
    parser.add_argument("--mode", choices=MODES, default="decode")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=16, help="tokens that each request generates")
    parser.add_argument("--memory", type=float, default=0.05, help="share of the memory of a GPU")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_apart(answer, args, folder)
        answers = json.loads((folder / "answers.json").read_text())
        register_classes(*json.loads((folder / "served" / "config.json").read_text())["architectures"])
        options: dict[str, Any] = {"enable_prefix_caching": False}
        if torch.cuda.is_available():
            options.update(gpu_memory_utilization=args.memory, kv_cache_memory_bytes=1 << 30)
        engine = LLM(
            str(folder / "served"),
            dtype="float32",
            max_model_len=2048,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            tensor_parallel_size=args.tensor_parallel_size,
            disable_custom_all_reduce=True,  # see serving_vllm.py
            **{**options, **MODES[args.mode]},
        )
        engine.collective_rpc(poison)
    parameters = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True)
    passes = []
    for _ in range(2):
        prompts: Any = [{"prompt_token_ids": request["prompt"]} for request in answers]
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
        pairs = [
            (list(output.outputs[0].token_ids), request["tokens"])
            for output, request in zip(outputs, answers, strict=True)
        ]
        passes.append(
            {
                "requests": len(pairs),
                "equal": sum(ours == theirs for ours, theirs in pairs),
                "equal_tokens": sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)),
                "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
            }
        )
        print(args.mode, f"{args.tensor_parallel_size} processes", passes[-1], flush=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = {
        "environment": {**describe(), "vllm": vllm.__version__},
        "commit": args.commit or current_commit(),
        "settings": {name: value for name, value in settings.items() if name not in ("output", "commit")},
        "graphs": str(engine.llm_engine.vllm_config.compilation_config.cudagraph_mode),
        "prompt_tokens": sum(len(request["prompt"]) for request in answers),
        "passes": passes,
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
