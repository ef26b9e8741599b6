"""SparseK: the Euclidean projection onto the k-capped simplex, exact and differentiable.

    sparsek(z, k) = argmin_p ||p - z||^2   subject to   0 <= p <= 1,  sum(p) = k
                  = clip(z - tau, 0, 1)    with tau the root of  f(tau) = sum_i clip(z_i - tau, 0, 1) = k

`f` is piecewise linear and non-increasing, with a breakpoint at every `z_i` and every `z_i - 1`. Sorting the scores
gives `f` at all breakpoints from prefix sums, the segment that holds the root follows, and inside a segment the root
is a quotient. No iteration, no tolerance. k = 1 is sparsemax.

Lou et al. 2024 (arXiv 2406.16747); the derivation is ours.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def sparsek(scores: Tensor, k: int, dim: int = -1) -> Tensor:
    """Project scores onto the k-capped simplex: gates in [0, 1] that sum to `k`.

    Args:
        scores: any shape, any float dtype. `-inf` marks entries that cannot be selected; they get 0.
        k: the sum of the gates, at least 1.
        dim: the dimension that is projected.

    Returns:
        Gates of the shape and dtype of `scores`; computed in float32, or float64 for float64 input. Where no more
        than `k` entries are finite, every finite entry gets 1 (the sum is then their count).

    The gradient is exact: `J g = s * (g - mean of g over s)` with `s` the entries strictly between 0 and 1; saturated
    and excluded entries get none.

    Raises:
        ValueError: `k` below 1, or scores that are not floating point. NaN and `+inf` are not checked.

    >>> sparsek(torch.tensor([3.0, 0.5, 0.1, -2.0]), k=2)
    tensor([1.0000, 0.7000, 0.3000, 0.0000])
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if scores.shape[dim] == 0:
        return scores.clone()
    exact = scores.movedim(dim, -1).to(torch.promote_types(scores.dtype, torch.float32))
    gates = _SparseK.apply(exact, k)
    return gates.movedim(-1, dim).to(scores.dtype)


class _SparseK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, k: int) -> Tensor:
        ordered = scores.sort(dim=-1, descending=True).values
        finite = ordered > -torch.inf
        tau = threshold(ordered, finite.unsqueeze(-2), k).squeeze(-1)
        gates = (scores - tau.unsqueeze(-1)).clamp(0, 1)
        # Everything is selected where tau is -inf; -inf minus -inf is not a number.
        gates = torch.where(scores > -torch.inf, gates, torch.zeros_like(gates))
        ctx.save_for_backward(gates)
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (gates,) = ctx.saved_tensors  # type: ignore[attr-defined]
        free = ((gates > 0) & (gates < 1)).to(grad.dtype)
        mean = (free * grad).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=1)
        return free * (grad - mean), None


def threshold(ordered: Tensor, member: Tensor, k: int) -> Tensor:
    """Thresholds tau of several subsets of one sorted list of scores.

    Args:
        ordered: `[..., N]` scores in descending order.
        member: `[..., C, N]` bool, which of the N scores belong to each of the C subsets; scores of `-inf` must not.
        k: the sum of the gates.

    Returns:
        `[..., C]` tau of each subset, `-inf` where the subset has at most `k` members. The dtype of `ordered`.
    """
    # Prefix sums lose digits in float32, and tau is a small difference of them.
    wide = ordered.dtype if ordered.device.type == "mps" else torch.float64
    z = ordered.to(wide).masked_fill(ordered == -torch.inf, 0.0)
    origin = z[..., :1]
    z = (z - origin).masked_fill(ordered == -torch.inf, -torch.inf)
    filled = z.masked_fill(z == -torch.inf, 0.0)

    zero = member.new_zeros((*member.shape[:-1], 1), dtype=wide)
    count = torch.cat([zero, member.to(wide).cumsum(-1)], -1)  # [..., C, N + 1]: members among the first j
    total = torch.cat([zero, (member * filled.unsqueeze(-2)).cumsum(-1)], -1)

    # Both searches compare with the breakpoints as they were rounded: (z - 1) + 1 need not be z.
    def support(tau: Tensor) -> Tensor:  # how many of the N scores lie strictly above tau
        return torch.searchsorted(-z, -tau)

    def saturated(tau: Tensor) -> Tensor:  # how many of the N scores lie strictly above tau + 1
        return torch.searchsorted(1 - z, -tau)

    def at(table: Tensor, index: Tensor) -> Tensor:
        return table.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def overflow(limit: Tensor, index: Tensor) -> Tensor:  # sum of z - limit over the members among the first `index`
        return at(total, index) - at(count, index) * limit

    # The root lies just above the largest breakpoint where f is still at least k, found by bisection for all subsets at
    # once. Non-members are breakpoints too: they are harmless, f is linear across them. Rounding must not push a
    # breakpoint with f = k below k.
    points = torch.cat([z, z - 1], -1).sort(dim=-1, descending=True).values
    slack = 1e-12 if wide == torch.float64 else 1e-5
    first = torch.zeros(count.shape[:-1], dtype=torch.int64, device=z.device)
    last = torch.full_like(first, points.shape[-1] - 1)  # f is the number of members there: below k, tau is -inf anyway
    for _ in range(points.shape[-1].bit_length()):
        middle = (first + last) // 2
        point = points.gather(-1, middle)
        tau = point.masked_fill(point == -torch.inf, 0.0)
        mass = overflow(tau, support(tau)) - overflow(tau + 1, saturated(tau))
        reached = (mass >= k * (1 - slack)) | (point == -torch.inf)
        first, last = torch.where(reached, first, middle + 1), torch.where(reached, middle, last)
    low = points.gather(-1, last)
    limit = low.masked_fill(low == -torch.inf, 0.0)
    w, u = support(limit), saturated(limit)
    in_u = at(count, u)
    free = at(count, w) - in_u
    inside = at(total, w) - at(total, u)
    root = torch.where(free > 0, (inside + in_u - k) / free.clamp(min=1), limit)
    tau = root + origin
    return torch.where((low == -torch.inf) | (count[..., -1] <= k), -torch.inf, tau).to(ordered.dtype)
