"""Measure perplexities of dense softmax, of entmax over all keys, and over the tiles that queries choose.

    python benchmarks/predicted_quality.py --model MODEL --adapter ADAPTER --text held-out.txt --output OUT.json

Every chunk is read with all three, and of the losses of one chunk the difference counts, with its standard error over
the chunks. Beside it stand the keys with weight and the mass that the tiles miss, per layer, over some queries of the
first chunk, and how many tiles are listed. The JSON is written after every row.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import current_commit  # beside this file
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse.atomic_files import write_json
from hf_sparse.core.overrides import override
from hf_sparse.environment import describe
from hf_sparse.methods.sparsefinder.attention import AttentionInputs, SparsefinderAttention
from hf_sparse.methods.sparsefinder.observing import all_keys
from hf_sparse.ops.entmax import pooled_tiles, support
from hf_sparse.ops.tiles import Tiles
from hf_sparse.patches import sparse_layers_in_use

AT_ONCE = 2048  # tokens whose logits are computed at once
SAMPLED = 256  # queries of a chunk over which support and recall are measured

Pattern = Callable[[AttentionInputs], Tiles | None]


def chosen(text: AttentionInputs, options: argparse.Namespace, choices: int, pool: int) -> Tiles:
    return pooled_tiles(
        text.query,
        text.key,
        size=options.tile,
        rows=options.query_tile or options.tile,
        choices=choices,
        pool=pool,
        scaling=text.scaling,
        causal=True,
        window=options.window,
    )


@torch.no_grad()
def losses(body: Any, head: Any, chunks: Tensor) -> Tensor:
    """Return the mean loss of every chunk, float64."""
    means = []
    for chunk in chunks:
        states = body(input_ids=chunk[None]).last_hidden_state[0]
        total = torch.zeros((), dtype=torch.float64, device=chunk.device)
        for begin in range(0, len(chunk) - 1, AT_ONCE):
            end = min(begin + AT_ONCE, len(chunk) - 1)
            logits = head(states[begin:end]).float()
            total += F.cross_entropy(logits, chunk[begin + 1 : end + 1], reduction="sum").double()
        means.append(total / (len(chunk) - 1))
    return torch.stack(means).cpu()


class Patched:
    """Hold a model with an adapter, and read chunks with a pattern in every layer."""

    def __init__(self, model: Any) -> None:
        self.layers = [layer for layer in sparse_layers_in_use(model) if isinstance(layer, SparsefinderAttention)]
        self.body, self.head = model.get_base_model().model, model.get_output_embeddings()

    def losses(self, chunks: Tensor, pattern: Pattern, observer: Callable[..., None] | None = None) -> Tensor:
        with override(self.layers, pattern=pattern, observer=observer):
            return losses(self.body, self.head, chunks)


def measure(patched: Patched, chunks: Tensor, full: Tensor, pattern: Pattern) -> dict[str, Any]:
    """Return the perplexity with a pattern, how far it is above that over all keys, and how many tiles it lists."""
    counts: list[Tensor] = []
    shares: list[Tensor] = []

    def counted(text: AttentionInputs) -> Tiles | None:
        tiles = pattern(text)
        if tiles is not None:
            allowed = torch.arange(tiles.index.shape[2], device=tiles.index.device) * tiles.rows // tiles.size + 1
            counts.append(tiles.counts.double().mean())
            shares.append(tiles.counts.double().sum() / (allowed.sum() * tiles.index.shape[1]))
        return tiles

    found = patched.losses(chunks, counted)
    above = found - full
    return {
        "perplexity": math.exp(float(found.mean())),
        "above_all_keys": math.expm1(float(above.mean())),
        "standard_error": float(above.std() / math.sqrt(len(above))) if len(above) > 1 else None,
        "tiles": float(torch.stack(counts).mean()) if counts else None,
        "share_of_pairs": float(torch.stack(shares).mean()) if shares else None,
        "losses": found.tolist(),
    }


@torch.no_grad()
def of_layers(patched: Patched, chunk: Tensor, pattern: Pattern, size: int) -> dict[str, list[float]]:
    """Return of every layer the keys with weight per query, and the mass of entmax over all keys that tiles miss."""
    rows = torch.linspace(0, len(chunk) - 1, SAMPLED, device=chunk.device).long()
    found: dict[str, list[float]] = {"keys_with_weight": [], "mass_missed": []}

    def observe(text: AttentionInputs, *_: Any) -> None:
        tiles = pattern(text)
        number, missed = [], []
        for part in rows.split(32):
            weights = support(text.query, text.key, rows=part, **text.settings)[1][0]
            number.append((weights > 0).sum(-1).double().mean())
            by_tile = F.pad(weights, (0, -weights.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)
            if tiles is not None:
                listed = tiles.mask(by_tile.shape[-1])[0][:, part // tiles.rows]
                missed.append(1 - (by_tile * listed).sum(-1).double().mean())
        found["keys_with_weight"].append(round(float(torch.stack(number).mean()), 1))
        found["mass_missed"].append(round(float(torch.stack(missed).mean()), 5) if missed else 0.0)

    patched.losses(chunk[None], all_keys, observe)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="the base model, a folder or an id")
    parser.add_argument("--adapter", required=True, help="a Sparsefinder adapter, whose scales are used")
    parser.add_argument("--text", type=Path, required=True, help="text that nothing was trained on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--chunks", type=int, nargs="+", default=[20], help="chunks of each length, or of all")
    parser.add_argument("--choices", type=int, nargs="+", default=[4, 2, 8], help="tiles that each query chooses")
    parser.add_argument("--pools", type=int, nargs="+", default=[16], help="keys whose mean stands for them")
    parser.add_argument("--exact-layers", type=int, nargs="*", default=[], help="layers that attend to all keys, once")
    parser.add_argument("--tile", type=int, default=64, help="keys per tile")
    parser.add_argument("--query-tile", type=int, help="queries per tile; --tile by default")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    if len(options.chunks) not in (1, len(options.lengths)):
        parser.error(f"expected one number of chunks or {len(options.lengths)}, got {len(options.chunks)}")

    names = ("lengths", "chunks", "tile", "query_tile", "window", "dtype")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"model": Path(options.model).name, "adapter": Path(options.adapter).name, "text": options.text.name}
    result: dict[str, Any] = {"format": 1, "benchmark": "predicted_quality", "settings": settings}
    result |= {"commit": options.commit or current_commit(), **describe(), "rows": [], "layers": {}}
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(options.device)
    ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(encoding="utf-8"))["input_ids"]
    numbers = options.chunks * len(options.lengths) if len(options.chunks) == 1 else options.chunks
    texts = {
        length: torch.tensor(ids[: length * number], device=options.device).view(number, length)
        for length, number in zip(options.lengths, numbers, strict=True)
    }
    dense = {length: losses(base.model, base.get_output_embeddings(), chunks) for length, chunks in texts.items()}
    patched = Patched(PeftModel.from_pretrained(base, options.adapter).to(options.device).eval())

    def add(length: int, attention: str, found: dict[str, Any], **more: Any) -> None:
        result["rows"].append({"length": length, "chunks": len(texts[length]), "attention": attention, **more, **found})
        write_json(options.output, result)
        told = "" if found["tiles"] is None else f"{found['above_all_keys']:+.2%}  {found['tiles']:.1f} tiles"
        print(f"{length:6}  {attention:10} {more or ''} perplexity {found['perplexity']:.3f}  {told}", flush=True)

    for length, chunks in texts.items():
        full = patched.losses(chunks, all_keys)
        for attention, found in (("dense", dense[length]), ("all keys", full)):
            row = {"perplexity": math.exp(float(found.mean())), "tiles": None, "losses": found.tolist()}
            add(length, attention, row)
        for pool in options.pools:
            for choices in options.choices:

                def pattern(text: AttentionInputs, choices: int = choices, pool: int = pool) -> Tiles:
                    return chosen(text, options, choices, pool)

                add(length, "predicted", measure(patched, chunks, full, pattern), choices=choices, pool=pool)
                if options.exact_layers and (choices, pool) == (options.choices[0], options.pools[0]):

                    def partly(text: AttentionInputs, pattern: Pattern = pattern) -> Tiles | None:
                        return None if text.layer in options.exact_layers else pattern(text)

                    more = {"choices": choices, "pool": pool, "exact_layers": options.exact_layers}
                    add(length, "predicted", measure(patched, chunks, full, partly), **more)

        def first(text: AttentionInputs) -> Tiles:
            return chosen(text, options, options.choices[0], options.pools[0])

        result["layers"][str(length)] = of_layers(patched, chunks[0], first, options.tile)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
