"""Measure the graphs that a model attends by, as it attends."""

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.attention import AttentionInputs
from hf_sparse.ops.entmax import Certificate, support
from hf_sparse.ops.predictors.metrics import MetricMeans, graph_metrics, tile_sparsity
from hf_sparse.ops.tiles import Tiles


class GraphRecord:
    """Observe the attention modules of a model, and compare each graph with the gold graph of the same text.

    The gold graph is that of the queries and keys at hand: where earlier layers attend by a graph too, their errors are
    in it.

    Attributes:
        rows: `[R]` int64, the queries whose rows are compared, counted from 0.
        layers: metrics of each attention module by its number.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.layers: dict[int, MetricMeans] = {}

    @torch.no_grad()
    def __call__(self, text: AttentionInputs, graph: Tiles | Tensor | None, certificate: Certificate | None) -> None:
        queries, keys, heads = text.query.shape[2], text.key.shape[2], text.query.shape[1]
        rows = self.rows.to(text.key.device)
        _, probabilities = support(
            text.query, text.key, alpha=text.alpha, scaling=text.scaling, causal=text.causal, rows=rows
        )
        metrics: dict[str, Tensor] = {}
        if certificate is not None:
            graph = certificate.tiles
            metrics["certified_rows"] = certificate.exact.double().mean(-1)
            metrics["added_tiles"] = _per_head(certificate.added.double().mean(-1), heads, len(text.query))
        if isinstance(graph, Tiles):
            metrics["tile_sparsity"] = _per_head(tile_sparsity(graph, keys, causal=text.causal), heads, len(text.query))
            edges = graph.edges(queries, keys, causal=text.causal, rows=rows)
        elif graph is not None:
            edges = graph[:, :, rows]
        else:
            edges = torch.ones_like(probabilities, dtype=torch.bool)
        position = rows + keys - queries
        metrics |= graph_metrics(edges, probabilities, causal=text.causal, position=position)
        self.layers.setdefault(text.layer, MetricMeans()).add({name: value.cpu() for name, value in metrics.items()})

    def per_head(self) -> dict[str, list[list[float]]]:
        """Return for each metric a list per layer of a value per query head: means over texts."""
        layers = [self.layers[layer].per_head() for layer in sorted(self.layers)]
        return {name: [layer[name].tolist() for layer in layers] for name in layers[0]}

    def mean(self) -> dict[str, float]:
        """Return the means over texts, then over the heads of all layers."""
        layers = [self.layers[layer].per_head() for layer in sorted(self.layers)]
        return {name: float(torch.cat([layer[name] for layer in layers]).nanmean()) for name in layers[0]}


def _per_head(ratio: Tensor, heads: int, batch: int) -> Tensor:
    """Expand `[B or 1, H]` of graphs to `[B, Hq]`."""
    return ratio.repeat_interleave(heads // ratio.shape[1], 1).expand(batch, -1)
