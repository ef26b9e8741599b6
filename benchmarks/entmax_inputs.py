"""Keep the queries and keys of some layers of a converted model, for `entmax_prediction.py --inputs`.

    python benchmarks/entmax_inputs.py --model smollm2-135m-instruct --adapter smollm2-135m-instruct-sparsefinder \
        --text wiki.test.raw --lengths 4096 8192 --layers 2 10 20 28 --output smollm2.safetensors

Attention is entmax over all keys with the scales of the adapter. Kept are, for the first tokens of the text,
`NAME.query` `[1, Hq, T, D]`, `NAME.key` `[1, Hkv, T, D]` and `NAME.scaling` `[Hq]`, where a name is
`MODEL LENGTH layer NUMBER`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse.methods.sparsefinder.observing import all_keys
from hf_sparse.patches import sparse_layers_in_use


@torch.no_grad()
def queries_and_keys(model: nn.Module, ids: Tensor, layers: Sequence[int], name: str) -> dict[str, Tensor]:
    """Return the tensors of some layers in a forward over `ids` `[1, T]`, with entmax over all keys in every layer."""
    tensors: dict[str, Tensor] = {}

    def keep(text: Any, *_: Any) -> None:
        if text.layer in layers:
            prefix = f"{name} {ids.shape[1]} layer {text.layer}"
            for part in ("query", "key", "scaling"):
                tensors[f"{prefix}.{part}"] = getattr(text, part).detach().cpu().contiguous()

    patched: Sequence[Any] = sparse_layers_in_use(model)
    for layer in patched:
        layer.pattern, layer.observer = all_keys, keep
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for layer in patched:
            layer.pattern = layer.observer = None
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of its Sparsefinder adapter")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to read, with enough tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 20, 28])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="the safetensors to write")
    options = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(options.device)
    model = PeftModel.from_pretrained(base, options.adapter).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text("utf-8"), return_tensors="pt").input_ids.to(options.device)
    if ids.shape[1] < max(options.lengths):
        parser.error(f"expected a text of at least {max(options.lengths)} tokens, got {ids.shape[1]}")
    tensors: dict[str, Tensor] = {}
    for length in options.lengths:
        tensors |= queries_and_keys(model, ids[:, :length], options.layers, options.model.name)
    save_file(tensors, options.output)
    print(f"{options.output}: {len(tensors)} tensors", flush=True)


if __name__ == "__main__":
    main()
