"""What stands for the keys of a tile where every query has a list of its own: each key, clusters of keys, or parts.

The points of a trained adapter score each tile by the profile times the sum over its keys of `exp(-|q - k|^2)`, where
`k` is

- `keys`: the point of the key itself;
- `clusters N`: the nearest of N centroids;
- `parts P x N`: the nearest of N centroids in each of P parts of the point (product quantization).

    python benchmarks/learning/key_tiles.py ADAPTER --text FILE --output benchmarks/learning/results/key-tiles.jsonl

Centroids are fitted to chunks 8 to 11 of the text, read with entmax over all keys; the first chunk measures, graphs
compounding through the layers, lists of all heads equally long. What the file holds already is not run again.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from hf_sparse import from_pretrained
from hf_sparse.core.overrides import override
from hf_sparse.data import pack, read_text
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsefinder.attention import AttentionInputs
from hf_sparse.methods.sparsefinder.evaluation import predicting_layers
from hf_sparse.methods.sparsefinder.evaluation.quality import compared, output_of
from hf_sparse.methods.sparsefinder.evaluation.record import GraphRecord
from hf_sparse.methods.sparsefinder.predictors.projected import Span, always_joined
from hf_sparse.ops.predictors.clustering import assign_parts, cut_into_parts, points_of_parts
from hf_sparse.ops.predictors.distance import squared_distances
from hf_sparse.ops.predictors.kmeans import kmeans
from hf_sparse.ops.predictors.profile import distance_bins
from hf_sparse.ops.tiles import Tiles
from hf_sparse.ops.tiles.select import best_tiles
from hf_sparse.ops.tiles.tiles import own_tiles

KINDS = ("keys", "clusters 64", "clusters 256", "parts 8 x 64", "parts 32 x 16")


def centroids_of(kind: str, points: Tensor) -> tuple[Tensor, int] | None:
    """Centroids `[Hkv, N, r]` fitted to points `[Hkv, n, r]`, and the number of parts."""
    if kind == "keys":
        return None
    numbers = [int(word) for word in kind.split() if word.isdigit()]
    parts, clusters = numbers if len(numbers) == 2 else (1, numbers[0])
    found = kmeans(cut_into_parts(points, parts), clusters, generator=torch.Generator().manual_seed(0))
    return found.unflatten(0, (len(points), parts)).transpose(1, 2).flatten(2), parts


def lists(method: SparsefinderAttention, text: AttentionInputs, centroids: tuple[Tensor, int] | None) -> Tiles:
    """The best tiles of each query."""
    config, learned, length = method.config, method.parameters_in_use, text.key.shape[2]
    size = config.tile
    assert size is not None
    query, key = learned.project_queries(text.query), learned.project_keys(text.key)
    if centroids is not None:
        key = points_of_parts(assign_parts(key, *centroids), centroids[0])
    nearness = F.pad(-squared_distances(query, key), (0, -length % size), value=-torch.inf)
    scores = nearness.unflatten(3, (-1, size)).logsumexp(4)
    own = own_tiles(length, length, size, 1)
    scores += learned.log_profile[:, distance_bins(torch.arange(scores.shape[3]) - own[:, None])]
    always = always_joined(config, Span(length, length, True), scores.device)
    return best_tiles(scores, config.causal_tiles, size=size, rows=1, own=own, causal=True, always=always)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="of tiles, with a list for each query")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--base-model", help="instead of the one that the adapter names")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--sparsity", type=float, default=0.8)
    options = parser.parse_args()
    model = from_pretrained(options.adapter, base_model=options.base_model, dtype=torch.float32)
    base = options.base_model or model.peft_config["default"].base_model_name_or_path
    chunks = pack(AutoTokenizer.from_pretrained(base), read_text(options.text), 1024)
    methods = predicting_layers(model)
    tile = methods[0].config.tile
    if tile is None or methods[0].config.rows != 1:
        parser.error("expected an adapter of tiles with a list for each query (query_tile=1)")
    by_layer = {method.layer: method for method in methods}
    points: dict[int, list[Tensor]] = {}

    def all_keys(text: AttentionInputs) -> None:
        points.setdefault(text.layer, []).append(by_layer[text.layer].parameters_in_use.project_keys(text.key)[0])

    def read(pattern: Any, observer: Any, tokens: Tensor) -> Tensor:
        for method in methods:
            method.pattern, method.observer = pattern, observer
        return output_of(model, "causal", tokens, None)

    for chunk in chunks[8:12]:
        read(all_keys, None, chunk[None])
    keys = {layer: torch.cat(parts, 1) for layer, parts in points.items()}
    reference = read(lambda text: None, None, chunks[:1])
    with override([method.config for method in methods], sparsity=options.sparsity):
        there = options.output.read_text().splitlines() if options.output.exists() else []
        done = [(row["kind"], row["tile"], row["sparsity"]) for row in map(json.loads, there)]
        for kind in options.kinds:
            if (kind, tile, options.sparsity) in done:
                continue
            centroids = {layer: centroids_of(kind, found) for layer, found in keys.items()}
            record = GraphRecord(torch.arange(0, 1024, 8))
            found = read(
                lambda text, of=centroids: lists(by_layer[text.layer], text, of[text.layer]), record, chunks[:1]
            )
            comparison = compared("causal", found, reference, chunks[:1], None)
            values = {name: value.mean().item() for name, value in comparison.items()}
            row = {**record.mean(), "kind": kind, "tile": tile, "sparsity": options.sparsity}
            row |= {"perplexity": math.exp(values["nats"]), "divergence": values["divergence"], **describe()}
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                {name: row[name] for name in ("kind", "tile", "sparsity", "perplexity", "divergence", "mass_recall")},
                flush=True,
            )


if __name__ == "__main__":
    main()
