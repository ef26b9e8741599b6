"""Train the scorers of a model as it is and in fp8, and measure both without fp8: KL from the dense model.

    python benchmarks/finetune_precision.py --model MODEL --text FILE --output finetune_precision.json

The model is loaded in bfloat16, on a CPU in float32 (fp8 is emulated there, with `HF_SPARSE_EMULATE_FP8=1`). Each
precision trains new scorers, from the same weights and on the same chunks, after which other chunks are measured
without fp8. `base_kl` is the KL of the base model in fp8 from itself, both dense.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from measuring import current_commit  # beside this file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig, patch, unpatch
from hf_sparse.atomic_files import write_json
from hf_sparse.data import pack, read_text
from hf_sparse.environment import describe
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.float8 import float8_recipe, products_in_float8
from hf_sparse.finetune.objectives import distill
from hf_sparse.finetune.processes import separate_accelerate_state
from hf_sparse.ops.divergence import divergence


@torch.no_grad()
def loss(model: nn.Module, chunks: Tensor) -> float:
    """Return the mean KL per token of sparse from dense attention, over chunks `[N, T]`."""
    return statistics.mean(float(distill(model, chunk)) for chunk in chunks.split(1))


@torch.no_grad()
def base_kl(model: nn.Module, chunks: Tensor) -> float:
    """Return the mean KL per token of a dense model in fp8 from itself, over chunks `[N, T]`."""
    with separate_accelerate_state():
        accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[float8_recipe()])
        found = []
        for chunk in chunks.split(1):
            expected = model(input_ids=chunk).logits[0]
            with products_in_float8(accelerator, model), torch.autocast(chunk.device.type, dtype=torch.bfloat16):
                found.append(float(divergence(model(input_ids=chunk).logits[0], expected)) / chunk.shape[1])
    return statistics.mean(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm-start-steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--measured", type=int, default=8, help="chunks to measure, the last ones of the text")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chunks = pack(tokenizer, read_text(str(options.text)), options.length)
    seen, held_out = chunks[: -options.measured], chunks[-options.measured :].to(device)
    result: dict[str, Any] = {"format": 1, "benchmark": "finetune_precision", "commit": options.commit}
    result |= {"commit": options.commit or current_commit(), **describe(), "length": options.length, "rows": []}
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    model.to(device).eval().requires_grad_(False)
    for precision in ("no", "fp8"):
        torch.manual_seed(0)
        patch(model, SparseKConfig(k=188, window=64, sinks=4))
        before = loss(model, held_out)
        settings: dict[str, Any] = {"steps": options.steps, "warm_start_steps": options.warm_start_steps}
        settings |= {"mixed_precision": precision, "progress": False}
        history = finetune(model, seen, FinetuneConfig(**settings))["history"]
        row: dict[str, Any] = {"mixed_precision": precision, "kl_before": before, "kl_after": loss(model, held_out)}
        row["losses"] = [step["loss"] for step in history if step["stage"] == "distill"]
        row["tokens_per_second"] = statistics.median(step["tokens_per_second"] for step in history)
        unpatch(model)
        result["rows"].append(row)
        print({name: value for name, value in row.items() if name != "losses"}, row["losses"][::20], flush=True)
        write_json(options.output, result)
    result["base_kl"] = base_kl(model, held_out)
    print("base_kl", result["base_kl"], flush=True)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
