"""The loss of Sparsefinder's projections: how well they predict the graph of the model that they are read from.

The gold graph is computed on the fly, for a sample of queries, from the queries and keys of a forward with entmax over
all keys. No gradient reaches the model, so the layers are independent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.finetune.config import GraphLoss
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsefinder.attention import AttentionInputs
from hf_sparse.ops.entmax import support
from hf_sparse.ops.predictors import losses
from hf_sparse.ops.predictors.profile import distance_bins
from hf_sparse.ops.tiles.allowed import allowed_edges, positions_of


def graph_loss(
    model: nn.Module,
    methods: list[SparsefinderAttention],
    *batch: Tensor,
    kind: GraphLoss,
    rows: int,
    seed: int,
) -> Tensor:
    """Mean of a loss over the attention modules; its gradient goes to their projections.

    Args:
        model: runs with entmax over all keys, in `train` mode of the methods.
        methods: of the model.
        *batch: chunks `[B, T]`; labels, which may follow, are not used.
        kind: see `FinetuneConfig.graph_loss`.
        rows: queries per text and module.
        seed: of the choice of queries, and of the pairs that a hinge draws.
    """
    found: list[Tensor] = []

    def observe(method: SparsefinderAttention) -> Callable[..., None]:
        generator = torch.Generator().manual_seed(seed * 1_009 + method.layer)

        def observer(text: AttentionInputs, *_: Any) -> None:
            with torch.enable_grad():
                loss = _of_layer(method, text, kind, rows, generator)
                found.append(_settled(loss, method).to(batch[0].device))

        return observer

    with observed(methods, observe), torch.no_grad():
        model(input_ids=batch[0])
    return torch.stack(found).mean()


@contextmanager
def observed(
    methods: list[SparsefinderAttention], observer: Callable[[SparsefinderAttention], Callable[..., None]]
) -> Iterator[None]:
    """Every method has an observer of its own within a `with` block."""
    before = [method.observer for method in methods]
    try:
        for method in methods:
            method.observer = observer(method)
        yield
    finally:
        for method, previous in zip(methods, before, strict=True):
            method.observer = previous


def sample(length: int, rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """`rows` different queries of a text, or all if there are fewer: `[R]` int64, ascending."""
    return torch.randperm(length, generator=generator)[:rows].sort().values.to(device)


def _of_layer(
    method: SparsefinderAttention, text: AttentionInputs, kind: GraphLoss, rows: int, generator: torch.Generator
) -> Tensor:
    learned, length = method.parameters_in_use, text.key.shape[2]
    chosen = sample(length, rows, generator, text.key.device)
    options: dict[str, Any] = {"alpha": text.alpha, "scaling": text.scaling, "causal": text.causal}
    _, probabilities = support(text.query, text.key, rows=chosen, **options)
    allowed = allowed_edges(positions_of(length, length, chosen), length, causal=text.causal)
    query = learned.project_queries(text.query[:, :, chosen].detach())
    key = learned.project_keys(text.key.detach())
    if kind == "profile_nce":
        assert method.config.tile is not None
        return _profile_nce(learned.log_profile, chosen, method.config.tile, query, key, probabilities, allowed)
    if kind == "info_nce":
        return losses.info_nce(query, key, probabilities, allowed)
    hinge = {"pair_hinge": losses.pair_hinge, "sum_hinge": losses.sum_hinge, "mass_hinge": losses.mass_hinge}[kind]
    return hinge(query, key, probabilities, allowed, generator=generator)


def _profile_nce(
    log_profile: Tensor, position: Tensor, size: int, query: Tensor, key: Tensor, probabilities: Tensor, allowed: Tensor
) -> Tensor:
    """`info_nce` with the profile in its softmax, as predictors have it: points learn what distance does not say.

    Args:
        log_profile: `[Hq, BINS]`.
        position: `[R]` int64, of the queries.
        size: positions per tile.
        query, key, probabilities, allowed: as in `hf_sparse.ops.predictors.losses.info_nce`.
    """
    tile = torch.arange(key.shape[2], device=key.device) // size
    prior = log_profile[:, distance_bins(tile - position[:, None] // size)]
    wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    inner = 2 * query @ wide.transpose(-1, -2)
    logits = prior + inner - query.square().sum(-1, keepdim=True) - wide.square().sum(-1)[:, :, None]
    surprise = -logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(-1)
    return (probabilities * surprise.masked_fill(probabilities == 0, 0.0)).sum(-1).mean()


def _settled(loss: Tensor, method: SparsefinderAttention) -> Tensor:
    """The same value and gradient without the memory of how it came about, which all layers together would fill."""
    projections = list(method.parameters_in_use.projections())
    gradients = torch.autograd.grad(loss, projections)
    # 0 times, so to say: the value stays, and the gradient of each parameter is the one just computed.
    carriers = [((p - p.detach()) * g).sum() for p, g in zip(projections, gradients, strict=True)]
    return loss.detach() + torch.stack(carriers).sum()
