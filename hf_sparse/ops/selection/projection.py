"""Project scores onto the k-capped simplex (SparseK): exact and differentiable.

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


def sparsek(scores: Tensor, k: int | Tensor, dim: int = -1) -> Tensor:
    """Project scores onto the k-capped simplex: gates in [0, 1] that sum to `k`.

    Args:
        scores: any shape, any float dtype. `-inf` marks entries that cannot be selected; they get 0.
        k: the sum of the gates, at least 1; a tensor of integers has one for each projection, in the shape of `scores`
            without `dim`, and is not checked.
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
    if not isinstance(k, Tensor) and k < 1:
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
    def forward(ctx: FunctionCtx, scores: Tensor, k: int | Tensor) -> Tensor:
        ordered = scores.sort(dim=-1, descending=True).values
        k = k.unsqueeze(-1) if isinstance(k, Tensor) else k
        origin, tau = subset_thresholds(ordered, (ordered > -torch.inf).unsqueeze(-2), k)
        # Relative to the k-th best score, which is within 1 of the threshold: scores of any size lose no digits.
        gates = ((scores - origin) - tau.to(scores.dtype)).clamp(0, 1)
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


def subset_thresholds(ordered: Tensor, member: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """Find the thresholds tau of several subsets of one sorted list of scores.

    The threshold lies between the k-th best score of its subset and 1 below it. It is returned relative to that score:
    added to a large one, it would be rounded.

    Args:
        ordered: `[..., N]` scores in descending order.
        member: `[..., C, N]` bool, which of the N scores belong to each of the C subsets; scores of `-inf` must not.
        k: the sum of the gates; a tensor of integers has that of each subset, `[..., C]`.

    Returns:
        `origin` `[..., C]` in the dtype of `ordered`, the k-th best score of each subset, and `tau` `[..., C]`, from -1
        to 0, in float64 (float32 on MPS): the gate of a score `z` is `clip((z - origin) - tau, 0, 1)`. A subset of at
        most `k` members has the origin 0 and a tau of `-inf`.
    """
    dtype = ordered.dtype if ordered.device.type == "mps" else torch.float64
    zero = member.new_zeros((*member.shape[:-1], 1), dtype=dtype)
    count = torch.cat([zero, member.to(dtype).cumsum(-1)], -1)  # [..., C, N + 1]: members among the first j
    full = count[..., -1] <= k
    k_of_each = k.unsqueeze(-1) if isinstance(k, Tensor) else k

    def pick(table: Tensor, index: Tensor) -> Tensor:
        return table.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    best = (count[..., 1:] < k_of_each).sum(-1).clamp(max=ordered.shape[-1] - 1)  # index of the k-th best member
    origin = ordered.gather(-1, best).masked_fill(full, 0.0)
    # Scores further than 1 from the k-th best are saturated or 0 whatever tau is: prefix sums stay small.
    z = (ordered.to(dtype).unsqueeze(-2) - origin.to(dtype).unsqueeze(-1)).clamp_(-1.0, 1.0)  # [..., C, N]
    total = torch.cat([zero, (member * z).cumsum(-1)], -1)
    # Both searches compare with the breakpoints as they were rounded: (z - 1) + 1 need not be z.
    falling, shifted = (-z).contiguous(), (1 - z).contiguous()

    def support(tau: Tensor) -> Tensor:  # how many of the N scores lie strictly above tau
        return torch.searchsorted(falling, -tau.unsqueeze(-1)).squeeze(-1)

    def saturated(tau: Tensor) -> Tensor:  # how many of the N scores lie strictly above tau + 1
        return torch.searchsorted(shifted, -tau.unsqueeze(-1)).squeeze(-1)

    def overflow(limit: Tensor, index: Tensor) -> Tensor:  # sum of z - limit over the members among the first `index`
        return pick(total, index) - pick(count, index) * limit

    # The root lies just above the largest breakpoint where f is still at least k, found by bisection for all subsets at
    # once, among the `z` and among the `z - 1`. Non-members are breakpoints too: they are harmless, f is linear across
    # them. Rounding must not push a breakpoint with f = k below k.
    slack = 1e-12 if dtype == torch.float64 else 1e-5

    def largest(points: Tensor) -> Tensor:
        first = torch.zeros(count.shape[:-1], dtype=torch.int64, device=z.device)
        last = torch.full_like(first, points.shape[-1])  # none of them: f is at least k at -1
        for _ in range((points.shape[-1] + 1).bit_length()):
            middle = (first + last) // 2
            point = pick(points, middle.clamp(max=points.shape[-1] - 1))
            tau = point.clamp(min=-1.0)
            mass = overflow(tau, support(tau)) - overflow(tau + 1, saturated(tau))
            reached = (mass >= k * (1 - slack)) | (point <= -1) | (middle == points.shape[-1])
            first, last = torch.where(reached, first, middle + 1), torch.where(reached, middle, last)
        point = pick(points, last.clamp(max=points.shape[-1] - 1))
        return torch.where(last == points.shape[-1], -1.0, point.clamp(min=-1.0))

    limit = torch.maximum(largest(z), largest(-shifted))
    w, u = support(limit), saturated(limit)
    in_u = pick(count, u)
    free = pick(count, w) - in_u
    inside = pick(total, w) - pick(total, u)
    root = torch.where(free > 0, (inside + in_u - k) / free.clamp(min=1), limit)
    return origin, root.masked_fill(full, -torch.inf)
