"""Compute the losses of projections: a query should be nearer to the keys of its gold edges than to others.

All losses take a sample of query rows, the squared distance `d` of projected points, and gold edges, the pairs with an
entmax probability above 0. Others are drawn from allowed keys only, never from padding or the future. Every loss is the
mean over the rows that have an allowed key; a row without gold edges, or without others, adds 0.

The hinges are of Treviso et al. 2022 (arXiv 2109.12188), per pair as in the paper or once per query as in the released
code. The hinge weighted by mass and InfoNCE with the probabilities as target are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse.ops.predictors.projections import by_group, check_points

_MARGIN = 1.0  # margin of the hinges


def pair_hinge(
    query: Tensor,
    key: Tensor,
    probabilities: Tensor,
    allowed: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute the mean over the gold edges of a row of `max(0, 1 + d(edge) - d(other))`, each with an other of its own.

    Args:
        query: `[B, Hq, R, r]`, points of a sample of queries.
        key: `[B, Hkv, Tk, r]`, those of all keys.
        probabilities: `[B, Hq, R, Tk]`, entmax over all allowed keys.
        allowed: `[B, H, R, Tk]` bool; `B` and `H` may be 1. See `allowed_edges`.
        generator: on any device, for the others; they are drawn without replacement while there are enough.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit.
    """
    pairs = _draw(query, key, probabilities, allowed, generator)
    return _mean(pairs.hinges().sum(-1) / pairs.exists.sum(-1).clamp(min=1), allowed)


def sum_hinge(
    query: Tensor,
    key: Tensor,
    probabilities: Tensor,
    allowed: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute `max(0, 1 + sum of d(edge) - sum of d(other))` of each row, as the released code has it.

    Arguments, result and errors are those of `pair_hinge`. There are as many others as gold edges, so the query itself
    drops out of the gradient: `d/dq = 2 * (sum of others - sum of gold keys)` where the hinge is active.
    """
    pairs = _draw(query, key, probabilities, allowed, generator)
    gap = (pairs.edge - pairs.other).masked_fill(~pairs.exists, 0.0).sum(-1)
    return _mean((_MARGIN + gap).clamp(min=0).masked_fill(~pairs.exists.any(-1), 0.0), allowed)


def mass_hinge(
    query: Tensor,
    key: Tensor,
    probabilities: Tensor,
    allowed: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute `pair_hinge` with the gold edges weighted by their probability instead of equally."""
    pairs = _draw(query, key, probabilities, allowed, generator)
    return _mean((pairs.hinges() * pairs.mass).sum(-1), allowed)


def info_nce(query: Tensor, key: Tensor, probabilities: Tensor, allowed: Tensor) -> Tensor:
    """Compute the cross entropy of the probabilities and `softmax(-d)` over all allowed keys.

    Arguments and errors as in `pair_hinge`. Nothing is drawn.
    """
    distance, mass = _prepare(query, key, probabilities, allowed)
    logits = (-distance).masked_fill(~allowed, torch.finfo(distance.dtype).min)
    # A key without mass may have any logarithm, even infinity; its product with the mass 0 must be 0.
    surprise = -logits.log_softmax(-1).masked_fill(mass == 0, 0.0)
    return _mean((mass * surprise).sum(-1), allowed)


class _Pairs(NamedTuple):
    """Hold the gold edges of each row, each with another key; as many columns as the row with most edges needs."""

    edge: Tensor  # [B, Hq, R, m], squared distance
    other: Tensor
    mass: Tensor  # probability of the edge, detached
    exists: Tensor  # bool

    def hinges(self) -> Tensor:
        return (_MARGIN + self.edge - self.other).clamp(min=0).masked_fill(~self.exists, 0.0)


def _draw(
    query: Tensor,
    key: Tensor,
    probabilities: Tensor,
    allowed: Tensor,
    generator: torch.Generator | None,
) -> _Pairs:
    distance, mass = _prepare(query, key, probabilities, allowed)
    gold = mass > 0
    others = allowed & ~gold
    edges, spare = gold.sum(-1, keepdim=True), others.sum(-1, keepdim=True)
    width = int(edges.amax()) if edges.numel() else 0
    where = distance.device if generator is None else generator.device
    shuffled = torch.rand(distance.shape, generator=generator, device=where).to(distance.device)
    first = gold.byte().argsort(dim=-1, descending=True, stable=True)[..., :width]
    order = shuffled.masked_fill(~others, 2.0).argsort(dim=-1)
    column = torch.arange(width, device=distance.device)
    # A row with fewer others than edges takes them again.
    drawn = order.gather(-1, column % spare.clamp(min=1))
    return _Pairs(
        distance.gather(-1, first),
        distance.gather(-1, drawn),
        mass.gather(-1, first),
        (column < edges) & (spare > 0),
    )


def _prepare(query: Tensor, key: Tensor, probabilities: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Compute squared distances and probabilities, `[B, Hq, R, Tk]`; the latter 0 wherever not allowed."""
    check_points(query, key)
    shape = (*query.shape[:3], key.shape[2])
    fits = allowed.dtype == torch.bool and allowed.ndim == 4 and allowed.shape[2:] == shape[2:]
    if probabilities.shape != shape or not fits:
        raise ValueError(
            f"expected probabilities {shape} and allowed [B, H, {shape[2]}, {shape[3]}] bool, "
            f"got {tuple(probabilities.shape)} and {tuple(allowed.shape)} {allowed.dtype}"
        )
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        # Padding may hold anything, and a weight of 0 would not keep NaN out of the gradients.
        seen, sees = allowed.any(1).any(1), allowed.any(-1)
        key = key.to(dtype).masked_fill(~seen[:, None, :, None], 0.0)
        query = by_group(query.to(dtype).masked_fill(~sees[..., None], 0.0), key.shape[1])
        inner = query @ key[:, :, None].transpose(-1, -2)
        norms = query.square().sum(-1)[..., None] + key.square().sum(-1)[:, :, None, None]
        distance = (norms - 2 * inner).flatten(1, 2)
        return distance, probabilities.detach().to(dtype).masked_fill(~allowed, 0.0)


def _mean(loss: Tensor, allowed: Tensor) -> Tensor:
    """Average `[B, Hq, R]` over the rows that have an allowed key."""
    rows = allowed.any(-1).expand_as(loss)
    return loss.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)
