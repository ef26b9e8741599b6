"""Peak memory and time of one training step: all logits at once, logits per slice, and layers run again.

    python benchmarks/learning/memory.py --length 1024 2048 4096

A random Llama, one layer count and width for all, so that nothing has to be loaded. Every step runs in a process of its
own, and the peak counts from before the step. All variants must agree in the loss, or nothing is printed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import SparseKConfig, patch
from hf_sparse.environment import describe
from hf_sparse.finetune.objectives import distill
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.patches import sparse_layers

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 65536,
}
VARIANTS = ("all logits", "per slice", "per slice, layers run again")


def step(variant: str, length: int, device: str) -> dict[str, float]:
    """One forward and backward of `distill`, in this process."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().requires_grad_(False).to(device)
    patch(model, SparseKConfig())
    for method in sparse_layers(model):
        method.train()
    if variant == "all logits":
        model.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    tokens = torch.randint(SHAPE["vocab_size"], (1, length), device=device)
    before, began = _memory(device), time.perf_counter()
    if variant == VARIANTS[2]:
        with recomputed(model):
            loss = distill(model, tokens)
    else:
        loss = distill(model, tokens)
    loss.backward()
    value = loss.item()
    return {"loss": value, "bytes": _memory(device) - before, "seconds": time.perf_counter() - began}


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(step(arguments.variant, arguments.length[0], arguments.device)))
        return
    rows: list[dict[str, Any]] = []
    for length in arguments.length:
        results = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--length", str(length), "--device", arguments.device]
            output = subprocess.run([*command, "--variant", variant], check=True, capture_output=True, text=True).stdout
            results[variant] = json.loads(output.splitlines()[-1])
        losses = [result["loss"] for result in results.values()]
        if max(losses) - min(losses) > 1e-6 * max(1, *losses):
            sys.exit(f"the variants do not agree on the loss at {length} tokens: {losses}")
        rows.append({"length": length, "variants": results})
    print(json.dumps({"shape": SHAPE, "device": arguments.device, "rows": rows, **describe()}, indent=1))


if __name__ == "__main__":
    main()
