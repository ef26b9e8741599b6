"""Measure the density of entmax over all keys: the share of the allowed pairs of a query and a key with weight."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.data import check_chunks
from hf_sparse.evaluation.switching import evaluating, switched
from hf_sparse.methods.sparsefinder.attention import AttentionInputs, Observer
from hf_sparse.methods.sparsefinder.evaluation.operating_points import predicting_layers
from hf_sparse.methods.sparsefinder.observing import all_keys, observed
from hf_sparse.model_kinds import final_states
from hf_sparse.ops.entmax import support
from hf_sparse.ops.tiles.allowed import allowed_edges, positions_of

_QUERIES = 64  # of each text on which the density is measured


def density_observer(densities: list[float]) -> Observer:
    """Return an observer that appends the density of every text, on a sample of its queries."""

    def observe(text: AttentionInputs, *_: Any) -> None:
        length = text.key.shape[2]
        queries = torch.linspace(0, length - 1, min(length, _QUERIES), device=text.key.device).round().long()
        edges = support(text.query, text.key, rows=queries, **text.settings)[0]
        allowed = allowed_edges(positions_of(length, length, queries), length, causal=text.causal).sum()
        densities.append(float(edges.sum() / (allowed * edges.shape[0] * edges.shape[1])))

    return observe


@torch.no_grad()
def layer_densities(model: nn.Module, chunks: Tensor) -> dict[int, float]:
    """Return the mean density of every patched layer, with entmax over all keys in all of them.

    Args:
        model: a model with Sparsefinder attention; it comes back as it was. Its predictors need not be fitted.
        chunks: `[N, T]` int64, read one by one.

    Returns:
        By index among the attention layers of the model, for the layers that are patched.

    Raises:
        DataError: chunks that the model cannot read.
        ValueError: a model without Sparsefinder attention.
    """
    layers, device = predicting_layers(model), next(model.parameters()).device
    check_chunks(model, chunks)
    densities: dict[int, list[float]] = {layer.layer: [] for layer in layers}
    with (
        evaluating(model),
        switched(layers, True),
        observed(layers, lambda layer: density_observer(densities[layer.layer]), pattern=all_keys, certify=False),
    ):
        for chunk in chunks:
            final_states(model, chunk[None].to(device))
    return {layer: sum(values) / len(values) for layer, values in densities.items()}
