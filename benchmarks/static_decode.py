"""How fast steps go in a static cache, compiled and captured: dense attention, and entmax of Sparsefinder.

Entmax is over all keys, which is exact, or over the tiles of 8 keys that clusters predict, `--tiles` for each query.

    python benchmarks/static_decode.py --output static_decode.json

The model has the shape of Llama 3.1 8B and random weights, and its cache is filled with drawn keys, values and clusters
of keys: a prompt of this length would take most of the time, and nothing here depends on what it says. Logit scales are
searched in the first step so that `--support` keys have weight in the mean. All models are compiled as `generate`
compiles them and take the same steps, one model after the other; each number is the median of several runs.

Before each attention, logits of its compiled steps are compared with those of the same steps in plain PyTorch, on two
layers in float32; without agreement it is not measured. The bytes that the attention of a step reads follow from shapes
and supports. Most of the time goes to compilation, which grows with the layers. The JSON is written after every row,
and what is named first in `--attention` comes first.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llamas import LLAMA_8B, TINY, make_llama  # beside this file
from measuring import current_commit, wait
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from hf_sparse import SparsefinderConfig, patch, unpatch
from hf_sparse._compat import with_cache
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.methods.sparsefinder import attention as sparsefinder
from hf_sparse.methods.sparsefinder.predictors import clustering
from hf_sparse.ops.entmax import step as few
from hf_sparse.ops.entmax.threshold import distribution
from hf_sparse.patches import sparse_layers

ALLOWED = 1e-3  # largest relative difference of the comparison
CHECKED = 4  # steps of the comparison
ATTENTION = ("dense", "entmax", "predicted")
TILE, CLUSTERS = 8, 16


def make_model(options: argparse.Namespace, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    shape: dict[str, Any] = LLAMA_8B | (TINY if options.tiny else {}) | {"num_hidden_layers": layers}
    return make_llama(shape, options.length + options.steps + 8, dtype=dtype, device=options.device)


class Steps:
    """Take steps after a text that is `length` tokens long, from the same state each time."""

    def __init__(self, model: Any, options: argparse.Namespace, length: int, compiled: bool) -> None:
        self.model, self.length, self.device = model, length, options.device
        self.room = length + options.steps
        self.ids = torch.zeros((options.batch, 1), dtype=torch.int64, device=options.device)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.room)
        self.run = (
            torch.compile(model.__call__, mode=options.mode, backend=options.backend, fullgraph=True)
            if compiled
            else model
        )
        self.step(0)  # makes the cache's tensors; its token is overwritten
        generator = torch.Generator(options.device).manual_seed(0)
        layers: Any = self.cache.layers
        for layer in layers:
            for tensor in (layer.keys, layer.values):
                tensor.normal_(generator=generator)
            if getattr(layer, "key_codes", None) is not None:
                layer.key_codes.random_(CLUSTERS, generator=generator)
        self.reset()

    def reset(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    @torch.no_grad()
    def step(self, number: int) -> Tensor:
        position = torch.full_like(self.ids, self.length + number)
        mask = torch.ones((len(self.ids), self.room), dtype=torch.bool, device=self.device)
        mask[:, self.length + number + 1 :] = False
        if self.model.config._attn_implementation == "sdpa":
            mask = mask[:, None, None]
        else:
            mask[:, self.length + number + 1 :] = True  # the future
        model = self.run if number else self.model
        return model(self.ids, attention_mask=mask, position_ids=position, **with_cache(self.cache)).logits.clone()

    def seconds(self, steps: int) -> float:
        """Return the time of a step."""
        self.reset()
        begin = time.perf_counter()
        for number in range(1, steps):
            self.step(number)
        wait(self.device)
        return (time.perf_counter() - begin) / (steps - 1)


def find_scales(steps: Steps, support: float) -> list[float]:
    """Set logit scales at which so many keys have weight; returns what came out, layer by layer."""
    layers = iter(sparse_layers(steps.model, SparsefinderAttention))
    supports = []
    attend = sparsefinder.attend_few

    def observe(query: Tensor, key: Tensor, value: Tensor, scales: few.Scales, **options: Any) -> Tensor:
        learned = next(layers).parameters_in_use
        group = query.shape[1] // key.shape[1]
        seen = key[:, :, : steps.length]
        of_lists = query.float().unflatten(1, (-1, group)).squeeze(3)
        z = (of_lists.to(key.dtype) @ seen.transpose(-1, -2)).float().flatten(1, 2) * 0.5 * query.shape[3] ** -0.5
        low, high = torch.full_like(z[0, :, 0], 1e-3), torch.full_like(z[0, :, 0], 1e4)
        for _ in range(16):
            middle = (low * high).sqrt()
            count = (distribution(z * middle[:, None], 2.0) > 0).sum(-1).float().mean(0)
            low, high = torch.where(count > support, middle, low), torch.where(count > support, high, middle)
        learned.log_scale.data.copy_(middle.log())
        supports.append(float(count.mean()))
        return attend(query, key, value, learned.step_scales(query, query.shape[3] ** -0.5), **options)

    steps.reset()
    with mock.patch.object(sparsefinder, "attend_few", observe):
        steps.step(0)
    steps.reset()
    return supports


def sparse_steps(
    options: argparse.Namespace, model: PreTrainedModel, attention: str, tiles: int, length: int, compiled: bool
) -> Steps:
    """Patch a model and prepare its steps."""
    if attention == "entmax":
        return Steps(patch(model, SparsefinderConfig(predictor="full")), options, length, compiled)
    graph: dict[str, Any] = {"tile": TILE, "query_tile": 1, "clusters": CLUSTERS, "tiles_per_query": tiles}
    model = patch(model, SparsefinderConfig(**graph, window=64))
    ids = torch.randint(0, model.config.vocab_size, (1, min(512, length)), device=options.device)
    fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(ids, use_cache=False, logits_to_keep=1))
    return Steps(model, options, length, compiled)


def check(options: argparse.Namespace, attention: str, tiles: int) -> float:
    """Return the largest relative difference of the logits of a step and text.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    length = min(options.length, 1024)
    steps = sparse_steps(options, make_model(options, 2, torch.float32), attention, tiles, length, True)
    find_scales(steps, options.support)
    logits = [steps.step(number) for number in range(1, CHECKED)]
    steps.reset()
    steps.run = steps.model
    with (
        mock.patch.object(few, "takes_kernels", lambda *_: False),
        mock.patch.object(clustering, "takes_kernel", lambda *_: False),
    ):
        plain = [steps.step(number) for number in range(1, CHECKED)]
    differences = [((a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2))).tolist() for a, b in zip(logits, plain, strict=True)]
    # One list with another tile shows in one text. `max` would pass over a NaN that does not come first.
    difference = float(torch.tensor(differences).max())
    if not difference <= ALLOWED:
        sys.exit(
            f"compiled steps of {attention} attention differ from plain ones by {difference}, more than {ALLOWED}; "
            f"differences of steps and their texts one by one: {differences}; not measured"
        )
    return difference


def bytes_read(options: argparse.Namespace, config: Any, attention: str, tiles: int, supports: list[float]) -> int:
    """Count the bytes that the attention of a step reads in all layers: keys, products, codes, ranks and values."""
    heads, query_heads, layers = config.num_key_value_heads, config.num_attention_heads, config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    row = dim * getattr(torch, options.dtype).itemsize
    keys = options.batch * heads * options.length * layers
    if attention == "dense":
        return 2 * keys * row
    values = int(sum(supports) * options.batch * query_heads * row)
    if attention == "entmax":
        return keys * row + options.batch * query_heads * options.length * layers * 4 + values
    lists = options.batch * query_heads * layers
    codes, ranks = lists * options.length * 8, lists * options.length // TILE * 8
    listed = lists * tiles * TILE * row
    return codes + ranks + 2 * listed  # of the listed keys at most all have weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--support", type=float, default=55.0, help="keys with weight per query, of all")
    parser.add_argument(
        "--tiles", type=int, nargs="+", default=[16], help="tiles of 8 keys per query, where they are predicted"
    )
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--tiny", action="store_true", help="small layers, for a trial")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    contenders = [
        (name, tiles) for name in options.attention for tiles in (options.tiles if name == "predicted" else [0])
    ]
    options.mode = "reduce-overhead" if options.device == "cuda" and options.backend == "inductor" else None
    named = (
        "length",
        "batch",
        "layers",
        "steps",
        "runs",
        "support",
        "tiles",
        "device",
        "dtype",
        "backend",
        "mode",
        "tiny",
    )
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "static_decode",
        "commit": options.commit or current_commit(),
        "settings": {name: getattr(options, name) for name in named},
        "differences": {},
        "rows": [],
        **describe(),
    }
    began = time.perf_counter()
    model = make_model(options, options.layers, getattr(torch, options.dtype))
    for attention, tiles in contenders:
        if attention != "dense" and attention not in result["differences"]:
            torch._dynamo.reset()
            result["differences"][attention] = check(options, attention, max(options.tiles))
            print(f"{time.perf_counter() - began:.0f} s", result["differences"], flush=True)
        torch._dynamo.reset()
        supports: list[float] = []
        if attention == "dense":
            steps = Steps(model, options, options.length, True)
        else:
            steps = sparse_steps(options, model, attention, tiles, options.length, True)
            supports = find_scales(steps, options.support)
        begin = time.perf_counter()
        steps.seconds(5)
        compiled = time.perf_counter() - begin
        runs = [steps.seconds(options.steps) for _ in range(options.runs)]
        row = {
            "attention": attention,
            "tiles": tiles,
            "step_ms": 1e3 * statistics.median(runs),
            "steps_ms": [1e3 * run for run in runs],
            "tokens_per_second": options.batch / statistics.median(runs),
            "bytes_read": bytes_read(options, model.config, attention, tiles, supports),
            "compiling_s": compiled,
        }
        if supports:
            row["supports"] = supports
            unpatch(model)
        result["rows"].append(row)
        told = {name: value for name, value in row.items() if name != "supports"}
        print(f"{time.perf_counter() - began:.0f} s", told, flush=True)
        if options.output:
            write_json(options.output, result)
        del steps
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
