"""Describe the predicted and gold graphs of one text, for a few heads: the content of graphs.json."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse import environment
from hf_sparse.core.overrides import override
from hf_sparse.data import check_chunks, fingerprint
from hf_sparse.errors import DataError
from hf_sparse.evaluation.switching import evaluating, switched
from hf_sparse.methods.sparsefinder.attention import AttentionInputs
from hf_sparse.methods.sparsefinder.evaluation.attention_graph import attention_graphs
from hf_sparse.methods.sparsefinder.evaluation.operating_points import predicting_layers
from hf_sparse.model_kinds import final_states
from hf_sparse.ops.entmax import Certificate, support
from hf_sparse.ops.predictors.metrics import graph_metrics
from hf_sparse.ops.tiles import Tiles

FORMAT = 1

_HEADS = 6  # pictures that fit on a page
_LENGTH = 512  # tokens of a picture, so that each still is a dot
_READABLE = 32  # tokens of a picture whose tokens are written beside it


@torch.no_grad()
def describe_graphs(model: nn.Module, chunks: Tensor, *, tokenizer: Any = None, text_name: str = "") -> dict[str, Any]:
    """Describe the graphs of the beginning of a text, of heads from the best covered one to the worst.

    Graphs compound through the layers, and gold is that of the queries and keys that arise; see `measure_graphs`.

    Args:
        model: a patched model, its predictors fitted.
        chunks: `[N, T]` int64; of the first, at most 512 tokens are described.
        tokenizer: of the model, to describe the weights of the first 32 tokens, and those tokens, as well.
        text_name: what the text is called.

    Returns:
        What graphs.json holds: `length`, `tile` and `query_tile` (1 for a graph of tokens), and for each of `heads` its
        `layer`, `head`, `recall`, `mass_recall`, whether it is `causal`, the key tiles `predicted` for each query tile,
        and the `gold` keys of each query. With a tokenizer also `weights`: the `tokens` as texts, and for each of
        `heads` its `layer`, `head` and `weights`, for each query a list of keys and their weights above 0.

    Raises:
        DataError: a chunk that the model cannot read, or an adapter that predicts nothing.
    """
    layers = predicting_layers(model)
    if layers[0].config.predictor == "full":
        raise DataError("the predictor 'full' attends to all keys: there is no predicted graph to draw")
    if layers[0].config.entmax_native is not None and not layers[0].parameters_in_use.is_fitted:
        raise DataError(
            "the predictor was never fitted: there is no predicted graph to draw; finetune the adapter first"
        )
    tokens = chunks[:1, :_LENGTH]
    check_chunks(model, tokens)
    described: list[dict[str, Any]] = []
    sizes: set[tuple[int, int]] = set()

    def collect(text: AttentionInputs, graph: Tiles | Tensor | None, certificate: Certificate | None) -> None:
        tiles = certificate.tiles if certificate is not None else graph
        if not isinstance(tiles, Tiles):
            assert tiles is not None
            tiles = Tiles.of_mask(tiles, 1)
        sizes.add((tiles.size, tiles.rows))
        described.extend(_heads(text, tiles))

    observed = override(layers, pattern=None, observer=collect, certify=layers[0].config.complete)
    with evaluating(model), observed, switched(layers, True):
        final_states(model, tokens.to(next(model.parameters()).device))
    described.sort(key=lambda head: -head["mass_recall"])
    last = len(described) - 1
    tile, query_tile = sizes.pop()
    places = sorted({round(number * last / (_HEADS - 1)) for number in range(_HEADS)})
    heads = [described[place] for place in places]
    return {
        "format": FORMAT,
        "text": {"name": text_name, "sha256": fingerprint(tokens)},
        "length": tokens.shape[1],
        "tile": tile,
        "query_tile": query_tile,
        "heads": heads,
        **({} if tokenizer is None else {"weights": _weights(model, tokenizer, tokens[:, :_READABLE], heads)}),
        **environment.describe(),
    }


def _heads(text: AttentionInputs, tiles: Tiles) -> Iterator[dict[str, Any]]:
    """Describe the graph of each head of a layer in one text, see `describe_graphs`."""
    length, heads = text.key.shape[2], text.query.shape[1]
    edges = tiles.edges(length, length, causal=text.causal)
    gold, probabilities = support(text.query, text.key, **text.settings)
    metrics = graph_metrics(edges, probabilities, causal=text.causal)
    for head in range(heads):
        lists = tiles.index[0, head * tiles.index.shape[1] // heads]
        yield {
            "layer": text.layer,
            "head": head,
            "causal": text.causal,
            "recall": metrics["recall"][0, head].item(),
            "mass_recall": metrics["mass_recall"][0, head].item(),
            "predicted": [row[row >= 0].tolist() for row in lists],
            "gold": [row.nonzero().squeeze(1).tolist() for row in gold[0, head]],
        }


def _weights(model: nn.Module, tokenizer: Any, tokens: Tensor, heads: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe the weights of some heads for a text `[1, T]`, see `describe_graphs`."""
    graphs = attention_graphs(model, tokens, sorted({head["layer"] for head in heads}))
    described = []
    for head in heads:
        rows: list[list[tuple[int, float]]] = [[] for _ in range(tokens.shape[1])]
        weights = graphs[head["layer"]].weights[0, head["head"]].coalesce()
        for query, key, weight in zip(*weights.indices().tolist(), weights.values().tolist(), strict=True):
            rows[query].append((key, round(weight, 4)))
        described.append({"layer": head["layer"], "head": head["head"], "weights": rows})
    return {"tokens": [tokenizer.decode([token]) for token in tokens[0].tolist()], "heads": described}
