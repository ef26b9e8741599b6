"""How much attention predicted tiles cover: predictors and losses compared on the same queries and keys.

Queries and keys of some layers are read once from a model with entmax over all keys (teacher-forced: no error
of one layer reaches the next). Then each setting trains projections on the texts but the first, fits, and is measured
on the first.

    python benchmarks/learning/graphs.py --model DIR --text FILE --output benchmarks/learning/results/sparsefinder.jsonl

One JSON line per setting: mass recall at each tile sparsity, by layer. What the file holds already is not run again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparsefinderConfig, patch
from hf_sparse.core.layer import AttentionShape
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.methods.sparsefinder.graph_loss import graph_loss
from hf_sparse.methods.sparsefinder.predictors import ProjectedPredictor
from hf_sparse.methods.sparsefinder.predictors.projected import Span
from hf_sparse.ops.entmax import support
from hf_sparse.ops.predictors.pattern_tiles import nearest_scores
from hf_sparse.ops.tiles import Tiles, window_and_global
from hf_sparse.ops.tiles.select import best_tiles
from hf_sparse.patches import sparse_layers

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
TRAINED_FROM = 8192  # tokens of the text before this one train nothing
DIVIDED = {"head_budgets": True}
# Name: fields of SparsefinderConfig, and the loss (None: projections as they were made).
SETTINGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "distance, budgets of heads": ({"predictor": "distance", **DIVIDED}, "profile_nce"),
    "distance": ({"predictor": "distance"}, "profile_nce"),
    "clustering, 64 clusters, budgets of heads": ({"clusters": 64, "top_clusters": 1, **DIVIDED}, "profile_nce"),
    "distance, untrained": ({"predictor": "distance"}, None),
    "distance, no profile": ({"predictor": "distance", "profile": False}, "info_nce"),
    "distance, pair_hinge": ({"predictor": "distance"}, "pair_hinge"),
    "distance, info_nce": ({"predictor": "distance"}, "info_nce"),
    "distance, mass_hinge": ({"predictor": "distance"}, "mass_hinge"),
    "distance, sum_hinge": ({"predictor": "distance"}, "sum_hinge"),
    "clustering, 16 clusters": ({"clusters": 16}, "profile_nce"),
    "clustering, 64 clusters": ({"clusters": 64, "top_clusters": 1}, "profile_nce"),
    "quantization": ({"predictor": "quantization"}, "profile_nce"),
    "distance, rank 8": ({"predictor": "distance", "rank": 8}, "profile_nce"),
}

Texts = list[tuple[Tensor, Tensor]]  # queries and keys, in half precision


class Replay(nn.Module):
    """A layer that reads texts it has been given: tokens are their numbers."""

    def __init__(self, texts: Texts, config: SparsefinderConfig, layer: int, scaling: float) -> None:
        super().__init__()
        (_, heads, _, dim), kv_heads = texts[0][0].shape, texts[0][1].shape[1]
        self.texts, self.scaling = texts, scaling
        self.method = SparsefinderAttention.for_shape(AttentionShape(heads * dim, heads, kv_heads, dim, layer))
        self.method.add_adapter("default", config)

    def forward(self, input_ids: Tensor) -> None:
        query, key = (part.float() for part in self.texts[int(input_ids[0])])
        options: dict[str, Any] = {"valid": None, "cache": None, "scaling": self.scaling}
        self.method.attend(query, key, key, hidden_states=query, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama-like checkpoint")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--layers", default="2,18")
    parser.add_argument("--tile", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=4, help="training texts")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", help="settings")
    options = parser.parse_args()
    layers = [int(layer) for layer in options.layers.split(",")]
    texts, scaling = read(options, layers)
    golds = {layer: gold(texts[layer][0], scaling) for layer in layers}
    here = {"layers": layers, "tile": options.tile, "length": options.length, "texts": options.texts}
    here |= {"steps": options.steps}
    done = []
    if options.output.exists():
        done = [json.loads(line) for line in options.output.read_text().splitlines()]
    for name in [*(options.only or ("oracle", "nearest", *SETTINGS))]:
        if any(row["setting"] == name and here.items() <= row.items() for row in done):
            continue
        found = {layer: measure(name, texts[layer], golds[layer], layer, scaling, options) for layer in layers}
        row = {"setting": name, **here, "mass_recall": found, **describe()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, json.dumps(found), flush=True)


@torch.no_grad()
def read(options: argparse.Namespace, layers: list[int]) -> tuple[dict[int, Texts], float]:
    """Queries and keys of each layer, of the text's beginning and of the training texts."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    with options.text.open(newline="") as file:
        tokens = AutoTokenizer.from_pretrained(options.model)(file.read(400_000), return_tensors="pt", verbose=False)
    found: dict[int, Texts] = {layer: [] for layer in layers}
    patch(model, SparsefinderConfig(predictor="full"))
    for method in sparse_layers(model, SparsefinderAttention):
        if method.layer in found:
            into = found[method.layer]
            method.observer = lambda text, *_, into=into: into.append((text.query.half(), text.key.half()))
    starts = [0, *(TRAINED_FROM + options.length * i for i in range(options.texts))]
    for start in starts:
        model.get_decoder()(input_ids=tokens["input_ids"][:, start : start + options.length], use_cache=False)
    return found, found[layers[0]][0][0].shape[-1] ** -0.5


def gold(text: tuple[Tensor, Tensor], scaling: float) -> Tensor:
    """Entmax over all keys with the scale that adapters start with, `[1, Hq, T, T]`."""
    scale = SparsefinderConfig().initial_scale * scaling
    return support(text[0].float(), text[1].float(), alpha=1.5, scaling=scale, causal=True)[1]


def measure(
    name: str, texts: Texts, probabilities: Tensor, layer: int, scaling: float, options: argparse.Namespace
) -> dict[str, float]:
    """Mass recall at each sparsity."""
    tile, length = options.tile, options.length
    tiles = -(-length // tile)
    always = window_and_global(length, length, tile, window=tile, global_tokens=1, causal=True)
    mass = probabilities.unflatten(3, (tiles, tile)).sum(4).unflatten(2, (tiles, tile)).sum(3)
    changes, loss = SETTINGS.get(name, ({}, None))
    config = SparsefinderConfig(**{"tile": tile, "window": tile, "length": length, **changes})
    torch.manual_seed(0)
    replay = Replay(texts, config, layer, scaling)
    if name in SETTINGS:
        train(replay, loss, options.steps)
    found = {}
    for sparsity in SPARSITIES:
        config.sparsity = sparsity
        if name in SETTINGS:
            learned = replay.method.parameters_in_use
            query, key = (part.float() for part in texts[0])
            with torch.no_grad():
                predictor = learned.predictor
                assert isinstance(predictor, ProjectedPredictor)
                codes = predictor.query_codes(learned, query), predictor.key_codes(learned, key)
                graph = predictor.predict(learned, *codes, Span(length, length, causal=True))
            assert isinstance(graph, Tiles)
        else:
            scores = mass if name == "oracle" else nearest_scores(torch.arange(tiles), tiles).expand_as(mass)
            graph = best_tiles(scores, config.causal_tiles, size=tile, causal=True, always=always)
        found[str(sparsity)] = float((mass * graph.mask(tiles)).sum() / mass.sum())
    return found


def train(replay: Replay, loss: str | None, steps: int) -> None:
    """Projections on all texts but the first, then what is fitted."""
    method, count = replay.method, len(replay.texts) - 1

    def every_text() -> None:
        for number in range(count):
            replay(torch.tensor([number + 1]))

    method.train()
    fit_predictors([method], every_text, generator=torch.Generator().manual_seed(0))
    if loss is not None:
        projections = list(method.parameters_in_use.projections())
        optimizer = torch.optim.AdamW(projections, lr=2e-2, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
            batch = torch.tensor([step % count + 1])
            graph_loss(replay, [method], batch, kind=loss, rows=128, seed=step).backward()  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
        fit_predictors([method], every_text, generator=torch.Generator().manual_seed(0))
    method.eval()


if __name__ == "__main__":
    main()
