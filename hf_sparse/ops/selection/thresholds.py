"""Compute the thresholds of every prefix of a sequence, without a buffer of length x length.

For frozen scores both thresholds only rise as tokens arrive: `tau_t` of SparseK and `kappa_t`, the k-th best score. A
key that falls out never returns, so a scan over tiles of queries carries only the best candidates forward, and every
key is free (gate strictly between 0 and 1) on one contiguous interval of queries, which makes the backward linear.

Ties: of two equal scores the one with the lower index wins, everywhere. Scores are replaced by their rank, a unique
integer, so that the rule needs no second comparison.

Lou et al. 2024 (arXiv 2406.16747) for the operator; the scan and its backward are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.selection.projection import subset_thresholds

_TILE = 128
MOST_LISTED = 8192  # keys of a list that the kernels of this scan take


class Scan(NamedTuple):
    """Hold what a query needs to know about the keys that left its window.

    Attributes:
        rank: `[..., Tk]` int64, unique and higher is better; 0 marks a key that can never be selected.
        floor: `[..., Tq]` int64, a key is among the `size` best eligible ones of query t iff `rank >= floor[t]` and
            `rank > 0`.
        tau: `[..., Tq]` float64, threshold of SparseK over those best keys, differentiable; `-inf` where at most `k`
            keys are eligible. `None` unless asked for. The gates are small differences of scores and thresholds, for
            which the float32 next to a large threshold would not do.
        lists: `[..., n_tiles, at most size]` int64, the `size` best keys that are eligible for the first query of each
            tile, -1 where there are fewer. Zero tiles unless asked for.
    """

    rank: Tensor
    floor: Tensor
    tau: Tensor | None
    lists: Tensor


def rank_scores(scores: Tensor) -> Tensor:
    """Rank `[..., T]` scores by unique integers: higher is better, the lower index wins a tie, 0 for `-inf`."""
    length = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(length, 0, -1, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks).masked_fill_(scores == -torch.inf, 0)


def scan_prefixes(
    scores: Tensor,
    k: int,
    *,
    size: int,
    queries: int,
    window: int,
    tile: int = _TILE,
    with_tau: bool = False,
    with_lists: bool = False,
) -> Scan:
    """Scan the keys once, tile by tile; see `Scan`.

    Args:
        scores: `[..., Tk]` float32 or float64, `-inf` for keys that can never be selected.
        k: number of keys that SparseK selects.
        size: how many of the best keys a query may reach, at least `k`. Hard selection needs `k`; soft gates need
            their support, and are the exact projection of the `size` best scores when the support is larger.
        queries: `Tq`; the queries are the last `Tq` of the `Tk` positions.
        window: key j is eligible for the query at position p iff `j <= p - window`.
        tile: queries per tile.
        with_tau: also compute `tau`.
        with_lists: also return `lists`, a buffer of `Tq / tile * size`.
    """
    plan = ScanPlan(k, size, queries, window, tile, with_tau, with_lists)
    rank = rank_scores(scores.detach())
    if not with_tau:
        floor, _, lists = _scan(scores.detach(), rank, plan)
        return Scan(rank, floor, None, lists)
    tau, floor, lists = _Thresholds.apply(scores, rank, plan)
    return Scan(rank, floor, tau, lists)


def sparsek_thresholds(scores: Tensor, k: int, *, support: int | None = None, tile: int = _TILE) -> Tensor:
    """Compute `tau_t` of SparseK for each prefix: `sparsek(scores[..., :t + 1], k) = clip(scores - tau_t, 0, 1)`.

    Args:
        scores: `[..., T]` float32 or float64.
        k: sum of the gates, at least 1.
        support: spread the gates over at most this many of the best scores of each prefix (at least `k`), which
            bounds the cost of a step; `None` is exact SparseK.

    Returns:
        `[..., T]` in the dtype of `scores`, non-decreasing, `-inf` for prefixes of at most `k` finite scores.
        Differentiable in O(T log T); where every gate is 0 or 1, the gradient of `tau`, which changes no gate, is 0.
    """
    _check(k, support)
    length = scores.shape[-1]
    size = length if support is None else min(support, length)
    tau = scan_prefixes(scores, k, size=max(size, 1), queries=length, window=0, tile=tile, with_tau=True).tau
    assert tau is not None
    return tau.to(scores.dtype)


def topk_thresholds(scores: Tensor, k: int, *, tile: int = _TILE) -> tuple[Tensor, Tensor]:
    """Find the k-th best score of every prefix and its index; ties go to the lower index.

    Args:
        scores: `[..., T]` float32 or float64.
        k: at least 1.

    Returns:
        `kappa` `[..., T]`, `-inf` for prefixes of fewer than `k` finite scores, and its `index` `[..., T]` int64, -1
        there. Key i is selected at t iff `(scores[i], -i) >= (kappa[t], -index[t])`, compared in that order.
    """
    _check(k, None)
    length = scores.shape[-1]
    result = scan_prefixes(scores, k, size=k, queries=length, window=0, tile=tile)
    by_rank = torch.full((*scores.shape[:-1], length + 1), -1, device=scores.device)
    by_rank.scatter_(-1, result.rank, torch.arange(length, device=scores.device).expand_as(result.rank))
    index = by_rank.gather(-1, result.floor).masked_fill(result.floor == 0, -1)
    kappa = scores.gather(-1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf)
    return kappa, index


def _check(k: int, support: int | None) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if support is not None and support < k:
        raise ValueError(f"support must be at least k = {k}, got {support}")


class ScanPlan(NamedTuple):
    """Hold the arguments of `scan_prefixes` besides the scores."""

    k: int
    size: int
    queries: int
    window: int
    tile: int
    with_tau: bool
    with_lists: bool


def _scan(scores: Tensor, rank: Tensor, plan: ScanPlan) -> tuple[Tensor, Tensor, Tensor]:
    k, size, queries, window, tile, with_tau, with_lists = plan
    keys = scores.shape[-1]
    offset, device, batch = keys - queries, scores.device, scores.shape[:-1]
    tiles = -(-queries // tile)
    if scores.is_meta:  # kernels that go on from here are compiled ahead, and need shapes only
        list_shape = (*batch, tiles if with_lists else 0, min(size, keys))
        return rank.new_empty((*batch, queries)), _wide(scores).new_empty((*batch, queries)), rank.new_empty(list_shape)
    # One spare column at the end: rank 0 and score -inf, which index -1 and positions off the end point to.
    rank_of = torch.cat([rank, rank.new_zeros((*batch, 1))], -1)
    score_of = torch.cat([scores, scores.new_full((*batch, 1), -torch.inf)], -1)

    first = min(max(0, offset - window + 1), keys)  # keys before this one are eligible for the first query
    best = rank[..., :first].topk(min(size, first), dim=-1, sorted=True)
    carried = best.indices.masked_fill(best.values == 0, keys)
    step = torch.arange(tile, device=device)
    floors, taus, lists = [], [], []
    for number in range(tiles):
        start = offset + number * tile
        if with_lists:
            lists.append(carried)
        # The m-th newcomer of the tile is eligible from its query m + 1 on, the carried ones from query 0.
        newcomers = start - window + 1 + step
        newcomers = newcomers.where((newcomers >= 0) & (newcomers < keys), keys).expand(*batch, -1)
        candidates = torch.cat([carried, newcomers], -1)
        arrival = torch.cat([step.new_zeros(carried.shape[-1]), step + 1]).expand_as(candidates)
        ranks, order = rank_of.gather(-1, candidates).sort(dim=-1, descending=True)
        candidates, arrival = candidates.gather(-1, order), arrival.gather(-1, order)
        member = (arrival.unsqueeze(-2) <= step.unsqueeze(-1)) & (ranks > 0).unsqueeze(-2)  # [..., tile, N]
        count = member.cumsum(-1, dtype=torch.int32)
        # The rank of the size-th member, 0 while there are fewer.
        floors.append(torch.where(member & (count == size), ranks.unsqueeze(-2), 0).amax(-1))
        if with_tau:
            origin, relative = subset_thresholds(score_of.gather(-1, candidates), member & (count <= size), k)
            taus.append(origin + relative)
        carried = candidates[..., :size]
        if with_tau and size >= keys:
            # Exact SparseK: whatever the threshold has passed is gone for ever.
            alive = (score_of.gather(-1, carried) > taus[-1][..., -1:]).sum(-1)
            carried = carried[..., : max(int(alive.max()), 1)] if alive.numel() else carried
    shape = (*batch, 0)
    floor = torch.cat(floors, -1)[..., :queries].contiguous() if floors else rank.new_zeros(shape)
    tau = torch.cat(taus, -1)[..., :queries].cummax(-1).values.contiguous() if taus else _wide(scores).new_zeros(shape)
    width = max((entries.shape[-1] for entries in lists), default=0)
    padded = [torch.nn.functional.pad(entries, (0, width - entries.shape[-1]), value=keys) for entries in lists]
    stacked = torch.stack(padded, -2) if padded else rank.new_zeros((*batch, 0, width))
    return floor, tau, stacked.masked_fill(stacked == keys, -1)


def _wide(scores: Tensor) -> Tensor:
    """Make an empty tensor of the dtype in which `subset_thresholds` solves."""
    return scores.new_empty(0, dtype=scores.dtype if scores.device.type == "mps" else torch.float64)


class _Thresholds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, rank: Tensor, plan: ScanPlan) -> tuple[Tensor, Tensor, Tensor]:
        floor, tau, lists = _scan(scores, rank, plan)
        ctx.save_for_backward(scores, rank, floor, tau)
        ctx.first = plan.window - (scores.shape[-1] - plan.queries)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(floor, lists)
        return tau, floor, lists

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scores, rank, floor, tau = ctx.saved_tensors  # type: ignore[attr-defined]
        queries = tau.shape[-1]
        if queries == 0 or scores.shape[-1] == 0:
            return torch.zeros_like(scores), None, None
        arrival = torch.arange(scores.shape[-1], device=scores.device) + ctx.first  # type: ignore[attr-defined]
        z = scores.to(tau.dtype)
        begin = torch.searchsorted(tau, z - 1, right=True)  # saturated before
        begin = torch.maximum(begin, arrival.clamp(min=0).expand_as(begin))
        end = torch.minimum(torch.searchsorted(tau, z), torch.searchsorted(floor, rank, right=True))
        begin = begin.clamp(max=queries)
        end = torch.where(rank > 0, torch.maximum(end, begin), begin)
        # tau_t moves by 1/|F_t| with each of its free keys: sum that over each key's interval of queries.
        change = torch.zeros((*tau.shape[:-1], queries + 1), dtype=grad.dtype, device=grad.device)
        one = torch.ones_like(z)
        free = change.scatter_add(-1, begin, one).scatter_add(-1, end, -one).cumsum(-1)[..., :queries]
        share = torch.where(free > 0, grad / free.clamp(min=1), 0.0)
        change[..., 1:] = share.cumsum(-1)
        return (change.gather(-1, end) - change.gather(-1, begin)).to(scores.dtype), None, None
