"""How fast the forward of a whole model is with Sparsefinder's entmax, beside the dense model it was made of.

    python benchmarks/entmax_model.py --model smollm2-135m-instruct --adapter smollm2-135m-instruct-sparsefinder \
        --text wiki.test.raw --output entmax_model.json
    python benchmarks/entmax_model.py --shape llama-1b --output entmax_model-llama-1b.json

    dense      the base model without a patch, with torch's SDPA
    full       entmax over all keys: the predictor 'full'
    complete   the adapter with `complete=True`
    predicted  the adapter as it is: its predicted graph
    pooled     the scales of the adapter, with the predictor 'pooled' and its defaults at every length

Each call is `model(input_ids)` without gradients and without any other argument, as a user writes it: eager, with a
cache, and logits for all tokens. The models share their weights and are called in turns in one process; each number is
the median of several calls. Without a folder, weights and tokens are random and the predictors are fitted to them:
entmax of random queries and keys has far more keys with weight than that of a trained model.

First, on a short padded batch in float32, the logits of every variant are compared with those of the plain PyTorch
path; without agreement nothing is measured. The JSON is written after every cell. A profile counts the launches.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llamas import LLAMA_1B, SMOLLM2, TINY  # beside this file
from measuring import current_commit, kernels_of, profiler, wait
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_sparse import SparsefinderConfig
from hf_sparse.atomic_files import write_json
from hf_sparse.core.overrides import override
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder import fit_predictors
from hf_sparse.methods.sparsefinder.predictors import predictor_of
from hf_sparse.ops.entmax import api
from hf_sparse.patches import sparse_layers_in_use

SHAPES: dict[str, dict[str, Any]] = {"smollm2": SMOLLM2, "llama-1b": LLAMA_1B}
VARIANTS = ("dense", "full", "complete", "predicted", "pooled")
# The settings of the published adapter of SmolLM2, for random weights.
GRAPH: dict[str, Any] = {
    "rank": 32, "cluster_parts": 32, "clusters": 16, "top_clusters": 1, "tile": 8, "query_tile": 1, "window": 16,
    "head_budgets": True,
}  # fmt: skip
CHECKED = 333  # tokens of the comparison
ALLOWED = 1e-3  # largest relative difference of the comparison
PROFILED_MS = 1000  # a slower call has so many launches that its profile takes minutes
FITTED = 512  # tokens that predictors of random weights are fitted to


class Models:
    """Hold a dense model and a patched copy that shares its weights.

    Attributes:
        dense, sparse: the two models.
        pooled: another copy, with the scales of `sparse` and the predictor 'pooled'.
        ids: `[N]` int64, tokens to read.
        name: of the weights.
    """

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        needed = max(max(options.lengths) * max(options.batches), CHECKED)
        torch.manual_seed(0)
        if options.model:
            self.name = options.model.name
            self.dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            ids = tokenizer(options.text.read_text("utf-8"), return_tensors="pt").input_ids[0]
            self.ids = ids.repeat(-(-needed // len(ids)))[:needed].to(options.device)
            self.sparse = PeftModel.from_pretrained(self._copy(), options.adapter).to(options.device).eval()
            self.pooled = self._with_means()
            return
        self.name = options.shape
        shape = SHAPES[options.shape] | (TINY if options.tiny else {})
        config = LlamaConfig(**shape, max_position_embeddings=max(options.lengths))
        with torch.device(options.device):
            self.dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            self.ids = torch.randint(0, config.vocab_size, (needed,))
        graph = GRAPH | ({"rank": 16, "cluster_parts": 4} if options.tiny else {})
        self.sparse = get_peft_model(self._copy(), SparsefinderConfig(**graph)).to(options.device).eval()
        chunk = self.ids[None, : min(FITTED, len(self.ids))]
        fit_predictors(sparse_layers_in_use(self.sparse), lambda: self.sparse(chunk, use_cache=False))  # type: ignore[arg-type]
        self.pooled = self._with_means()

    def _with_means(self) -> Any:
        config = SparsefinderConfig(predictor="pooled", exact_up_to=0)
        model = get_peft_model(self._copy(), config).to(self.ids.device).eval()
        layers: Iterator[Any] = zip(sparse_layers_in_use(model), sparse_layers_in_use(self.sparse), strict=True)
        for ours, theirs in layers:
            ours.parameters_in_use.log_scale.data.copy_(theirs.parameters_in_use.log_scale.data)
        return model

    def _copy(self) -> Any:
        shared = {id(tensor): tensor for tensor in (*self.dense.parameters(), *self.dense.buffers())}
        return copy.deepcopy(self.dense, shared)

    @contextmanager
    def variant(self, name: str) -> Iterator[nn.Module]:
        """Give the model that is to be called for a variant, within a `with` block."""
        layers: Sequence[Any] = sparse_layers_in_use(self.sparse)
        if name in ("dense", "pooled"):
            yield getattr(self, name)
        elif name == "full":
            predictor = predictor_of(SparsefinderConfig(predictor="full"))
            with override([layer.parameters_in_use for layer in layers], predictor=predictor):
                yield self.sparse
        else:
            with override([layer.config for layer in layers], complete=name == "complete"):
                yield self.sparse


@torch.no_grad()
def check(options: argparse.Namespace) -> dict[str, float]:
    """Return the largest relative difference of a token's logits from those of the plain path, by variant.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    models = Models(options, torch.float32)
    tokens = models.ids[:CHECKED].expand(2, -1)
    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    differences = {}
    for name in VARIANTS[1:]:
        with models.variant(name) as model:
            found = model(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
            with mock.patch.object(api, "takes_kernels", lambda *_: False):
                plain = model(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
        differences[name] = float(((found - plain).norm(dim=-1) / plain.norm(dim=-1)).max())
    if not all(difference <= ALLOWED for difference in differences.values()):
        sys.exit(f"logits differ by more than {ALLOWED}: {differences}; nothing measured")
    return differences


@torch.no_grad()
def measure(models: Models, tokens: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds of a call and peak memory by variant, from calls in turns."""
    times: dict[str, list[float]] = {name: [] for name in options.only}
    peaks: dict[str, int] = {}
    for _ in range(1 + options.rounds):
        for name in options.only:
            if len(times[name]) > 1 and sum(times[name]) > 1e3 * options.seconds:
                continue
            with models.variant(name) as model:
                if options.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                wait(options.device)
                begin = time.perf_counter()
                model(tokens)
                wait(options.device)
                times[name].append(1e3 * (time.perf_counter() - begin))
                if options.device == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated() - held
    return {
        name: {"ms": statistics.median(found[1:]), "calls_ms": found, "peak_bytes": peaks.get(name)}
        for name, found in times.items()
    }


@torch.no_grad()
def profiles(models: Models, tokens: Tensor, names: Sequence[str], device: str) -> dict[str, Any]:
    """Return the kernels of one call, by variant."""
    rows = {}
    for name in names:
        with models.variant(name) as model, profiler(device) as found:
            model(tokens)
            wait(device)
        rows[name] = kernels_of(found.events() or [], 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="folder of a base model; needs --adapter and --text")
    parser.add_argument("--adapter", type=Path, help="folder of its Sparsefinder adapter")
    parser.add_argument("--text", type=Path, help="UTF-8 text to read, over and over if it is short")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2", help="of random weights")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to measure")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="after so many, a variant has enough calls of a cell"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a trial")
    parser.add_argument("--no-check", action="store_true", help="measure without the comparison, for a trial")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--output", type=Path, help="the JSON to write")
    options = parser.parse_args()
    if bool(options.model) != bool(options.adapter) or bool(options.model) != bool(options.text):
        parser.error("--model, --adapter and --text belong together: expected all of them or none")
    named = ("lengths", "batches", "rounds", "device", "dtype", "tiny")
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "entmax_model",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in named},
        **describe(),
    }
    if not options.no_check:
        result["differences"] = check(options)
        print("differences:", {name: f"{number:.1e}" for name, number in result["differences"].items()}, flush=True)
    models = Models(options, getattr(torch, options.dtype))
    result |= {"model": models.name, "layers": models.dense.config.num_hidden_layers, "rows": []}
    for batch in options.batches:
        for length in options.lengths:
            tokens = models.ids[: batch * length].view(batch, length)
            row = {"length": length, "batch": batch, **measure(models, tokens, options)}
            if batch == min(options.batches) and length in (min(options.lengths), max(options.lengths)):
                quick = [name for name in options.only if row[name]["ms"] < PROFILED_MS]
                row["profile"] = profiles(models, tokens, quick, options.device)
            result["rows"].append(row)
            told = "  ".join(f"{name} {row[name]['ms']:8.1f}" for name in options.only)
            print(f"{length:6} x {batch}  {told} ms", flush=True)
            if options.output:
                write_json(options.output, result)


if __name__ == "__main__":
    main()
