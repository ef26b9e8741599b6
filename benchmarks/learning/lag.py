"""What it costs that a causal tile is decided on when its first query comes: the best tiles, chosen early and late.

An oracle gives each tile of queries the key tiles with the most attention: that of the tile's own queries, which sees
later tokens than its first query does, or that of the queries up to the first one, which is all that generation has.

    python benchmarks/learning/lag.py ADAPTER --text FILE --output benchmarks/learning/results/sparsefinder-lag.json

Perplexity of the first chunk of the text, graphs compounding through the layers; all lists of a run are equally long.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.data import pack, read_text
from hf_sparse.evaluation.graphs import adapter_settings, predicting_methods
from hf_sparse.evaluation.graphs.points import tiles_per_query
from hf_sparse.evaluation.graphs.quality import compared, output_of
from hf_sparse.machine import describe
from hf_sparse.methods.sparsefinder import SparsefinderConfig
from hf_sparse.methods.sparsefinder.attention import Text
from hf_sparse.ops.entmax import support
from hf_sparse.ops.graphs import Tiles, window_and_global
from hf_sparse.ops.graphs.points import tile_of_query
from hf_sparse.ops.graphs.select import best_tiles
from hf_sparse.workflow import load_adapter


def oracle(text: Text, config: SparsefinderConfig, lag: int) -> Tiles:
    """The tiles with the most attention of the queries that begin `lag` positions before each tile of queries."""
    length, size = text.key.shape[2], config.tile or 1
    tiles = -(-length // size)
    options: dict[str, Any] = {"alpha": text.alpha, "scaling": text.scaling, "causal": True}
    by_tile = support(text.query, text.key, **options)[1]
    by_tile = torch.nn.functional.pad(by_tile, (0, -length % size)).unflatten(3, (tiles, size)).sum(4)
    speaks = tile_of_query(length, length, size, lag, text.key.device)
    mass = by_tile.new_zeros((*by_tile.shape[:2], tiles + 1, tiles)).index_add_(2, speaks, by_tile)[:, :, :tiles]
    count = tiles_per_query(config, length, length, True)
    near = window_and_global(
        length, length, size, window=config.window, global_tokens=config.global_tokens, causal=True
    )
    return best_tiles(mass, count, size=size, causal=True, always=near)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    found = output_of(model, "causal", tokens, None)
    return math.exp(compared("causal", found, found, tokens, None)["nats"].mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tiles", type=int, nargs="+", default=[16, 8, 4, 2])
    parser.add_argument("--sparsity", type=float, default=0.8)
    options = parser.parse_args()
    model, tokenizer = load_adapter(options.adapter, device="cpu", dtype="float32")
    tokens = pack(tokenizer, read_text(options.text), options.length)[:1]
    methods = predicting_methods(model)
    config = methods[0].config
    config.sparsity, config.length, config.tiles_per_query = options.sparsity, options.length, None

    def measured(pattern: Any) -> float:
        for method in methods:
            method.pattern = pattern
        found = perplexity(model, tokens)
        for method in methods:
            method.pattern = None
        return found

    rows: list[dict[str, Any]] = [{"tile": None, "chosen": "all keys", "perplexity": measured(lambda text: None)}]
    for tile in options.tiles:
        config.tile = tile
        for chosen, lag in (("late", 0), ("early", tile - 1)):
            found = measured(partial(oracle, config=config, lag=lag))
            rows.append({"tile": tile, "chosen": chosen, "lag": lag, "perplexity": found})
            print(rows[-1], flush=True)
    result = {"format": 1, "benchmark": "lag", "sparsity": options.sparsity, "length": options.length, "rows": rows}
    result |= {"adapter": adapter_settings(config) | {"tile": None}, **describe()}
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
