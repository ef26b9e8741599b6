"""What it would gain to divide the slots among the heads of each layer too, not only among the layers.

    python benchmarks/learning/heads.py ADAPTER --text FILE --output heads.json

The slots of a cache layer are one tensor for all its heads, so nothing can generate with such budgets: this measures
whether it would be worth building. Every KV head is attended to on its own, with a budget of its own. Heads are
measured one by one on chunks of the training text (`--chunks`), all others dense, and get shares as `hf-sparse divide`
gives them to layers; perplexity and KL from dense are those on `--held-out`, of scorers that are not trained further.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from arguments import adapter_and_text
from rich.progress import track
from torch import Tensor

import hf_sparse.methods.sparsek.attention as sparsek
from hf_sparse.adapters.load import load_adapter
from hf_sparse.data import pack, read_text, select_chunks
from hf_sparse.environment import describe
from hf_sparse.evaluation import compare
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.evaluation import budget_of
from hf_sparse.methods.sparsek.evaluation.layer_shares import best_shares
from hf_sparse.patches import sparse_layers_in_use

Slots = dict[int, list[int]]  # by layer, of each KV head


@contextmanager
def divided(methods: list[SparseKAttention], slots: Slots) -> Iterator[None]:
    """Whole texts are attended to with these slots, whatever the configuration says."""
    whole, layer = sparsek.sparsek_attention, [-1]

    def attend(method: SparseKAttention, *args: Any, **options: Any) -> Tensor:
        layer[0] = method.layer
        return type(method).attend(method, *args, **options)

    def by_head(*tensors: Tensor, **options: Any) -> Tensor:
        own = slots[layer[0]]
        sizes = own if len(set(own)) > 1 else own[:1]  # equal heads go together
        parts = zip(*(tensor.chunk(len(sizes), 1) for tensor in tensors), strict=True)
        budgets = [{**options, **budgets_of[layer[0]].resized(size)._asdict()} for size in sizes]
        return torch.cat([whole(*part, **budget) for part, budget in zip(parts, budgets, strict=True)], 1)

    budgets_of = {method.layer: method.budget for method in methods}
    try:
        sparsek.sparsek_attention = by_head
        for method in methods:
            method.attend = partial(attend, method)
        yield
    finally:
        sparsek.sparsek_attention = whole
        for method in methods:
            del method.attend


def main() -> None:
    arguments = _arguments()
    model, tokenizer = load_adapter(arguments.adapter, device=arguments.device, dtype="float32")
    text = pack(tokenizer, read_text(arguments.text), arguments.length)
    chunks, held_out = (select_chunks(text, part) for part in (arguments.chunks, arguments.held_out))
    methods, run = sparse_layers_in_use(model, SparseKAttention), (budget_of(model), "learned")
    heads = [(method.layer, head) for method in methods for head in range(method.num_key_value_heads)]

    def measured(slots: Slots, some: Tensor) -> dict[str, float]:
        with divided(methods, slots):
            losses = compare(model, some, [run], batch_size=arguments.batch_size)[run]
        return {"perplexity": losses.perplexity, "divergence": losses.mean_divergence}

    def filled(of: Callable[[int, int], int]) -> Slots:
        return {m.layer: [of(m.layer, head) for head in range(m.num_key_value_heads)] for m in methods}

    sizes, damages = (run[0].slots // 2, 2 * run[0].slots), []
    for size in sizes:
        work = track(heads, f"heads, {size} slots", disable=not arguments.progress)
        alone = [filled(lambda *at, only=only, n=size: n if at == only else arguments.length) for only in work]
        damages.append([measured(slots, chunks)["divergence"] for slots in alone])
    by_head = dict(zip(heads, best_shares(*damages, sizes), strict=True))
    # The same with one share for all heads of a layer, of the same measurements.
    layers = [method.layer for method in methods]
    sums = [
        [sum(damage for (layer, _), damage in zip(heads, row, strict=True) if layer == own) for own in layers]
        for row in damages
    ]
    by_layer = dict(zip(layers, best_shares(*sums, sizes), strict=True))
    least = run[0].sinks + 2
    ways: dict[str, Callable[[int, int], float]] = {
        "equal": lambda layer, head: 1.0,
        "layers": lambda layer, head: by_layer[layer],
        "heads": lambda layer, head: by_head[layer, head],
    }
    whole = {
        slots: {
            name: measured(filled(lambda *at, way=way, n=slots: max(least, round(n * way(*at)))), held_out)
            for name, way in ways.items()
        }
        for slots in arguments.slots or [run[0].slots]
    }
    result = {
        "slots": run[0].slots,
        "sizes": sizes,
        "damages": damages,
        "shares": {"layers": list(by_layer.values()), "heads": list(by_head.values())},
        "whole": whole,
        **describe(),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = adapter_and_text(__doc__)
    parser.add_argument("--held-out", default="110:130", help="START:STOP")
    parser.add_argument("--slots", nargs="+", type=int, help="budgets to measure; the adapter's own without it")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
