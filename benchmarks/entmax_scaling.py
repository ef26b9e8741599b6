"""How predicted entmax attention scales with the length: prediction of the tiles, attention over them, and both.

    python benchmarks/entmax_scaling.py --output entmax_scaling.json

The tiles are first compared with entmax over the same edges on a small odd size; without agreement nothing is measured.
Clustering is the predictor as it runs, projections included: square tiles, and lists of key tiles for each query, which
are found by the numbers of keys in each cluster or by the clusters of the parts of each key. Projections and centroids
are random: the cost does not depend on what was learned, because every list has the same length. `page bound` ranks
tiles by the extremes of their keys, two products per query and tile.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from attention_scaling import measure
from torch import Tensor

from hf_sparse import SparsefinderConfig
from hf_sparse.core.layer import AttentionShape
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters
from hf_sparse.methods.sparsefinder.predictors import ProjectedPredictor
from hf_sparse.methods.sparsefinder.predictors.projected import Span
from hf_sparse.ops.entmax import bound_scores, entmax_attention
from hf_sparse.ops.tiles import Tiles, window_and_global
from hf_sparse.ops.tiles.select import best_tiles

SHAPE = {"batch": 1, "query_heads": 9, "kv_heads": 3, "dim": 64}
CLUSTERS = {"rank": 4, "clusters": 64}
REACH: dict[str, Any] = {"window": 128, "global_tokens": 4}
PREDICTORS: dict[str, dict[str, Any]] = {
    "clustering": {"tile": 64, "tiles_per_query": 12, **CLUSTERS},
    "clustering, a list per query": {"tile": 16, "query_tile": 1, "tiles_per_query": 16, **CLUSTERS},
    "clusters of parts, a list per query": {
        "tile": 8,
        "query_tile": 1,
        "tiles_per_query": 32,
        "rank": 16,
        "cluster_parts": 16,
        "clusters": 16,
    },
}
BOUND = {"tile": 64, "tiles_per_query": 12}
METHODS = (*PREDICTORS, "page bound")
OPTIONS: dict[str, Any] = {"alpha": 1.5, "scaling": 0.35 * 64**-0.5, "causal": True}


def make_inputs(length: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = {"query": "query_heads", "key": "kv_heads", "value": "kv_heads"}
    return {
        name: torch.randn(SHAPE["batch"], SHAPE[of], length, SHAPE["dim"], generator=generator).to(device)
        for name, of in heads.items()
    }


@cache
def clusters(method: str, device: torch.device) -> SparsefinderParameters:
    """Projections and centroids as of one attention module, all lists equally long."""
    config = SparsefinderConfig(top_clusters=1, **REACH, **PREDICTORS[method])
    heads, kv_heads, dim = SHAPE["query_heads"], SHAPE["kv_heads"], SHAPE["dim"]
    torch.manual_seed(0)
    learned = SparsefinderParameters(config, AttentionShape(heads * dim, heads, kv_heads, dim, layer=0))
    learned.profile.fill_(1.0)
    learned.centroids.normal_()
    return learned.to(device)


def predict(inputs: dict[str, Tensor], method: str) -> Tiles:
    query, key = inputs["query"], inputs["key"]
    length = key.shape[2]
    if method in PREDICTORS:
        learned = clusters(method, key.device)
        predictor = learned.predictor
        assert isinstance(predictor, ProjectedPredictor)
        codes = predictor.query_codes(learned, query), predictor.key_codes(learned, key)
        graph = predictor.predict(learned, *codes, Span(length, length, causal=True))
        assert isinstance(graph, Tiles)
        return graph
    size = BOUND["tile"]
    scores = bound_scores(query, key, size=size, **OPTIONS)
    always = window_and_global(length, length, size, causal=True, device=scores.device, **REACH)
    return best_tiles(scores, BOUND["tiles_per_query"], size=size, causal=True, always=always)


def attend(inputs: dict[str, Tensor], tiles: Tiles) -> Tensor:
    return entmax_attention(inputs["query"], inputs["key"], inputs["value"], tiles=tiles, **OPTIONS)


def both(inputs: dict[str, Tensor], method: str) -> Tensor:
    return attend(inputs, predict(inputs, method))


def full(inputs: dict[str, Tensor]) -> Tensor:
    return entmax_attention(inputs["query"], inputs["key"], inputs["value"], **OPTIONS)


def check(device: torch.device) -> dict[str, float]:
    """Largest difference from entmax over the same edges, for each way to predict.

    Raises:
        SystemExit: a difference that rounding does not explain.
    """
    inputs = make_inputs(531, device)
    differences = {}
    for method in METHODS:
        tiles = predict(inputs, method)
        edges = tiles.edges(531, 531, causal=True)
        theirs = entmax_attention(inputs["query"], inputs["key"], inputs["value"], edges=edges, **OPTIONS)
        differences[method] = float((attend(inputs, tiles) - theirs).abs().max())
    if not all(difference <= 1e-5 for difference in differences.values()):
        sys.exit(f"the tiles differ from entmax over their edges by {differences}, more than 1e-5: nothing measured")
    return differences


@torch.no_grad()
def benchmark(lengths: list[int], device: torch.device, repeats: int, dense: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "entmax_scaling",
        "settings": {
            **SHAPE,
            **REACH,
            **OPTIONS,
            "methods": {**PREDICTORS, "page bound": BOUND},
            "device": device.type,
            "threads": torch.get_num_threads(),
        },
        "difference_from_edges": check(device),
        "rows": [],
        "ratios": [],
        **describe(),
    }
    inputs = [make_inputs(length, device) for length in lengths]
    parts: dict[tuple[str, str], list[Callable[[], object]]] = {}
    for method in METHODS:
        parts[method, "predict"] = [partial(predict, tensors, method) for tensors in inputs]
        parts[method, "attend"] = [partial(attend, tensors, predict(tensors, method)) for tensors in inputs]
        parts[method, "both"] = [partial(both, tensors, method) for tensors in inputs]
    if dense:
        parts["all keys", "attend"] = [partial(full, tensors) for tensors in inputs]
    for (method, part), runs in parts.items():
        everything = measure(runs, repeats, device)
        medians = [statistics.median(times) for times in everything]
        name = {"method": method, "part": part}
        for length, times, median in zip(lengths, everything, medians, strict=True):
            spread = {"least": min(times), "most": max(times)}
            result["rows"].append(name | {"length": length, "repeats": repeats, "seconds": median} | spread)
            print(f"{method:36}  {part:7}  {length:6} tokens  {median:8.3f} s", flush=True)
        ratio = medians[-1] / medians[0]
        result["ratios"].append(name | {"of": [lengths[-1], lengths[0]], "ratio": ratio})
        print(f"{method:36}  {part:7}  {lengths[-1]} / {lengths[0]}: {ratio:.2f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dense", action="store_true", help="also time entmax over all keys")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    result = benchmark(options.lengths, torch.device(options.device), options.repeats, options.dense)
    if options.output:
        unfinished = options.output.with_suffix(".partial")
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        unfinished.replace(options.output)


if __name__ == "__main__":
    main()
