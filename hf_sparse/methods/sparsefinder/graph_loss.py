"""Compute the loss of Sparsefinder's projections: how well they predict the graph of the model that they belong to.

The gold graph is computed on the fly, for a sample of queries, from the queries and keys of a forward with entmax over
all keys. No gradient reaches the model, so the layers are independent.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.methods.sparsefinder.attention import AttentionInputs, Observer, SparsefinderAttention
from hf_sparse.methods.sparsefinder.observing import observed
from hf_sparse.methods.sparsefinder.training_settings import GraphLoss
from hf_sparse.ops.entmax import support
from hf_sparse.ops.predictors import losses
from hf_sparse.ops.predictors.profile import distance_bins
from hf_sparse.ops.tiles.allowed import allowed_edges, positions_of


def graph_loss(
    model: nn.Module,
    layers: Sequence[SparsefinderAttention],
    *batch: Tensor,
    kind: GraphLoss,
    rows: int,
    seed: int,
) -> Tensor:
    """Return the mean of a loss over the sparse attention layers; its gradient goes to their projections.

    Args:
        model: runs with entmax over all keys, for its sparse layers are in `train` mode.
        layers: of the model.
        *batch: chunks `[B, T]`; labels, which may follow, are not used.
        kind: see `SparsefinderTrainingSettings.graph_loss`.
        rows: queries per text and module.
        seed: of the choice of queries, and of the pairs that a hinge draws.
    """
    losses_of_layers: list[Tensor] = []

    def observer_of(layer: SparsefinderAttention) -> Observer:
        generator = torch.Generator().manual_seed(seed * 1_009 + layer.layer)

        def observe(text: AttentionInputs, *_: Any) -> None:
            with torch.enable_grad():
                loss = _layer_loss(layer, text, kind, rows, generator)
                losses_of_layers.append(_with_gradient_only(loss, layer).to(batch[0].device))

        return observe

    with observed(layers, observer_of), torch.no_grad():
        model(input_ids=batch[0])
    return torch.stack(losses_of_layers).mean()


def _sample_queries(length: int, rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw `rows` different queries of a text, or all if there are fewer: `[R]` int64, ascending."""
    return torch.randperm(length, generator=generator)[:rows].sort().values.to(device)


def _layer_loss(
    layer: SparsefinderAttention, text: AttentionInputs, kind: GraphLoss, rows: int, generator: torch.Generator
) -> Tensor:
    """Return the loss of one layer on one text, see `graph_loss`."""
    learned, length = layer.parameters_in_use, text.key.shape[2]
    queries = _sample_queries(length, rows, generator, text.key.device)
    _, probabilities = support(text.query, text.key, rows=queries, **text.settings)
    allowed = allowed_edges(positions_of(length, length, queries), length, causal=text.causal)
    query = learned.project_queries(text.query[:, :, queries].detach())
    key = learned.project_keys(text.key.detach())
    if kind == "profile_nce":
        assert layer.config.tile is not None
        return _profile_nce(learned.log_profile, queries, layer.config.tile, query, key, probabilities, allowed)
    if kind == "info_nce":
        return losses.info_nce(query, key, probabilities, allowed)
    hinge = {"pair_hinge": losses.pair_hinge, "sum_hinge": losses.sum_hinge, "mass_hinge": losses.mass_hinge}[kind]
    return hinge(query, key, probabilities, allowed, generator=generator)


def _profile_nce(
    log_profile: Tensor, position: Tensor, size: int, query: Tensor, key: Tensor, probabilities: Tensor, allowed: Tensor
) -> Tensor:
    """Return `info_nce` with the profile in its softmax, as predictors have it: points learn what distance cannot tell.

    Args:
        log_profile: `[Hq, BINS]`.
        position: `[R]` int64, of the queries.
        size: positions per tile.
        query, key, probabilities, allowed: as in `hf_sparse.ops.predictors.losses.info_nce`.
    """
    tile = torch.arange(key.shape[2], device=key.device) // size
    prior = log_profile[:, distance_bins(tile - position[:, None] // size)]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # one for each query head
    inner = 2 * query @ key.transpose(-1, -2)
    logits = prior + inner - query.square().sum(-1, keepdim=True) - key.square().sum(-1)[:, :, None]
    surprise = -logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(-1)
    return (probabilities * surprise.masked_fill(probabilities == 0, 0.0)).sum(-1).mean()


def _with_gradient_only(loss: Tensor, layer: SparsefinderAttention) -> Tensor:
    """Return a loss of the same value and gradient that holds none of the activations it was computed from.

    The activations of all layers together would not fit into memory until the backward.
    """
    projections = list(layer.parameters_in_use.projections())
    gradients = torch.autograd.grad(loss, projections)
    # The term is 0, so the value stays; its gradient by a projection p is g, the one just computed.
    terms = [((p - p.detach()) * g).sum() for p, g in zip(projections, gradients, strict=True)]
    return loss.detach() + torch.stack(terms).sum()
