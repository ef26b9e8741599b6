"""What it costs that a causal tile is decided on when its first query comes: the best tiles, early, late, by query.

An oracle gives each tile of queries the key tiles with the most attention: that of the tile's own queries, which sees
later tokens than its first query does ("late"), or that of the queries up to the first one, which is all that
generation has ("early"). Where every query has a list of its own, there is nothing to wait for ("each query").

    python benchmarks/learning/lag.py ADAPTER --text FILE --output benchmarks/learning/results/sparsefinder-lag.json

Perplexity of the first chunk of the text, graphs compounding through the layers; all lists of a run are equally long,
except for "late, budgets": tiles of the adapter's size, divided among heads as the adapter has fitted it.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_sparse import from_pretrained
from hf_sparse.core.overrides import override
from hf_sparse.data import pack, read_text
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder import SparsefinderConfig
from hf_sparse.methods.sparsefinder.attention import AttentionInputs
from hf_sparse.methods.sparsefinder.evaluation import adapter_settings, predicting_layers
from hf_sparse.methods.sparsefinder.evaluation.operating_points import tiles_per_query
from hf_sparse.methods.sparsefinder.evaluation.quality import compared, output_of
from hf_sparse.methods.sparsefinder.predictors.budgets import divided_tiles
from hf_sparse.ops.entmax import support
from hf_sparse.ops.predictors.projections import tile_of_query
from hf_sparse.ops.tiles import Tiles, window_and_global
from hf_sparse.ops.tiles.select import best_tiles
from hf_sparse.ops.tiles.tiles import own_tiles, tile_counts


def oracle(
    text: AttentionInputs, config: SparsefinderConfig, lag: int, budgets: dict[int, Tensor] | None = None
) -> Tiles:
    """The tiles with the most attention of the queries that begin `lag` positions before each tile of queries.

    Args:
        text, config: what attends, and the sizes of tiles.
        lag: see `tile_of_query`.
        budgets: of each layer `[H, MEANS]`, how the adapter divides its tiles among heads; otherwise it does not.
    """
    length, size, rows = text.key.shape[2], config.tile or 1, config.rows or 1
    listed, tiles = tile_counts(length, length, size, rows)
    options: dict[str, Any] = {"alpha": text.alpha, "scaling": text.scaling, "causal": True}
    by_tile = support(text.query, text.key, **options)[1]
    by_tile = torch.nn.functional.pad(by_tile, (0, -length % size)).unflatten(3, (tiles, size)).sum(4)
    speaks = tile_of_query(length, length, rows, lag, text.key.device)
    mass = by_tile.new_zeros((*by_tile.shape[:2], listed + 1, tiles)).index_add_(2, speaks, by_tile)[:, :, :listed]
    count = tiles_per_query(config, length, length, True)
    if budgets is not None:
        count = divided_tiles(budgets[text.layer], count, listed)
    near = window_and_global(
        length, length, size, rows=rows, window=config.window, global_tokens=config.global_tokens, causal=True
    )
    own = own_tiles(listed, length, size, rows)
    return best_tiles(mass, count, size=size, rows=rows, own=own, causal=True, always=near)


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
    parser.add_argument("--base-model", help="instead of the one that the adapter names")
    options = parser.parse_args()
    model = from_pretrained(options.adapter, base_model=options.base_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(
        options.base_model or model.peft_config["default"].base_model_name_or_path
    )
    tokens = pack(tokenizer, read_text(options.text), options.length)[:1]
    methods = predicting_layers(model)
    with override([methods[0].config], sparsity=options.sparsity, length=options.length, tiles_per_query=None):
        result = compare(model, tokens, methods, options)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def compare(model: Any, tokens: Any, methods: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the oracle with tiles of queries that choose their keys early, late, or each for itself."""
    config = methods[0].config

    def measured(pattern: Any) -> float:
        for method in methods:
            method.pattern = pattern
        found = perplexity(model, tokens)
        for method in methods:
            method.pattern = None
        return found

    rows: list[dict[str, Any]] = [{"tile": None, "chosen": "all keys", "perplexity": measured(lambda text: None)}]
    settings = [("late", None, 0), ("early", None, 1), ("each query", 1, 0)]
    budgets = {method.layer: method.parameters_in_use.budgets for method in methods} if config.head_budgets else None
    if budgets is not None:
        found = measured(partial(oracle, config=config, lag=0, budgets=budgets))
        row = {"tile": config.tile, "query_tile": config.rows, "chosen": "late, budgets", "lag": 0, "perplexity": found}
        rows.append(row)
        print(row, flush=True)
    for tile in options.tiles:
        for chosen, query_tile, early in settings:
            lag = early * (tile - 1)
            with override([config], tile=tile, query_tile=query_tile):
                found, query_rows = measured(partial(oracle, config=config, lag=lag)), config.rows
            rows.append({"tile": tile, "query_tile": query_rows, "chosen": chosen, "lag": lag, "perplexity": found})
            print(rows[-1], flush=True)
    result = {"format": 1, "benchmark": "lag", "sparsity": options.sparsity, "length": options.length, "rows": rows}
    return result | {"adapter": adapter_settings(config) | {"tile": None, "query_tile": None}, **describe()}


if __name__ == "__main__":
    main()
