"""Solve a problem of SparseK attention whose KV heads select different numbers of keys, run by run.

The heads of a layer have nothing to do with each other, so those that follow one another and select as many keys are a
problem of their own, for what takes equal heads only. The causal kernels take all heads at once.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_sparse.ops.selection.problem import Problem

Counts = int | Sequence[int]


def numbers_per_head(
    k: Counts, support: Counts | None, heads: int
) -> tuple[int, int | None, tuple[tuple[int, int | None], ...] | None]:
    """Return the largest `k` and `support` of all KV heads, and those of each head where they differ.

    Raises:
        ValueError: there are numbers for more or fewer heads.
    """
    if not isinstance(k, Sequence) and not isinstance(support, Sequence):
        return k, support, None
    counts = k if isinstance(k, Sequence) else [k] * heads
    supports: Sequence[int | None] = support if isinstance(support, Sequence) else [support] * heads
    for name, number in (("k", len(counts)), ("support", len(supports))):
        if number != heads:
            raise ValueError(f"{name} must be a number, or one for each of {heads} KV heads, got {number} numbers")
    of_heads = tuple(zip(counts, supports, strict=True))
    bounds = [bound for bound in supports if bound is not None]
    return max(counts), max(bounds, default=None), of_heads if len(set(of_heads)) > 1 else None


def solve_by_heads(solve: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    """Return `solve(problem)`, `[B, Hq, Tq, D]`; called for each run of heads with the same numbers where these differ.

    Args:
        solve: takes problems without `of_heads`.
        problem: any.
    """
    numbers = problem.of_heads
    if numbers is None:
        return solve(problem)
    heads, group = len(numbers), problem.query.shape[1] // len(numbers)
    bounds = [0, *(head for head in range(1, heads) if numbers[head] != numbers[head - 1]), heads]
    outputs = []
    for first, end in pairwise(bounds):
        k, support = numbers[first]
        soft = problem.soft and k > 0
        run = problem._replace(
            query=problem.query[:, first * group : end * group],
            key=problem.key[:, first:end],
            value=problem.value[:, first:end],
            scores=problem.scores[:, first:end],
            k=k,
            support=support if soft else k,
            soft=soft,
            of_heads=None,
        )
        outputs.append(solve(run))
    return torch.cat(outputs, 1)
