"""Whether graphs completed by the page bound are full entmax on real text, through the whole model.

    python benchmarks/learning/complete.py ADAPTER --text FILE --output complete.json

In float64. Tells the largest difference between the logits with the completed graph and those over all keys (and with
the predicted graph alone, so that it is seen to matter), how many tiles were added to a list, and the share of rows for
which the bound proves that the predicted graph alone was enough.
"""

import argparse
import json
from statistics import fmean
from typing import Any

import torch
from arguments import adapter_and_text
from torch import Tensor

from hf_sparse.core.overrides import override
from hf_sparse.data import pack, read_text, select_chunks
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.patches import sparse_layers_in_use
from hf_sparse.workflow import load_adapter


def main() -> None:
    arguments = _arguments()
    model, tokenizer = load_adapter(arguments.adapter, device=arguments.device, dtype="float32")
    model = model.double().eval()
    text = pack(tokenizer, read_text(arguments.text), arguments.length)
    tokens = select_chunks(text, arguments.chunks).to(model.device)
    methods = sparse_layers_in_use(model, SparsefinderAttention)
    added, certified = [], []

    def note(text: Any, graph: Any, certificate: Any) -> None:
        added.append(certificate.added.double().mean().item())
        certified.append(certificate.exact.double().mean().item())

    def logits(predictor: str, complete: bool) -> Tensor:
        for method in methods:
            method.certify, method.observer = complete, note if complete else None
        configs = [method.config for method in methods]
        with torch.no_grad(), override(configs, predictor=predictor, complete=complete):
            return model(tokens).logits

    own = methods[0].config.predictor
    completed, alone, full = logits(own, True), logits(own, False), logits("full", False)
    result = {
        "largest_logit": full.abs().max().item(),
        "difference": {
            "completed": (completed - full).abs().max().item(),
            "predicted": (alone - full).abs().max().item(),
        },
        "added_tiles_per_list": fmean(added),
        "certified_rows": fmean(certified),
        "sparsity": methods[0].config.sparsity,
        "tokens": tokens.numel(),
        **describe(),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = adapter_and_text(__doc__)
    parser.set_defaults(chunks="0:1", length=1024)
    return parser.parse_args()


if __name__ == "__main__":
    main()
