"""Divide a call of SparseK attention among KV heads that select different numbers of keys.

The heads of a layer have nothing to do with each other, so those that follow one another and select as many keys are a
call of their own, by whichever implementation takes it.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Counts = int | Sequence[int]


def attend_by_heads(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    k: Sequence[int],
    support: Counts | None,
    **options: Any,
) -> Tensor:
    """Call `sparsek_attention` for each run of KV heads with the same `k` and `support`.

    Args:
        attend: `sparsek_attention`.
        query, key, value, scores: as there.
        k: for each KV head.
        support: for each KV head, or the same for all.
        options: its other arguments.

    Returns:
        `[B, Hq, Tq, D]`.

    Raises:
        ValueError: `k` or `support` is not for each KV head.
    """
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    supports: Sequence[int | None] = support if isinstance(support, Sequence) else [support] * heads
    for name, number in (("k", len(k)), ("support", len(supports))):
        if number != heads:
            raise ValueError(f"{name} must be a number, or one for each of {heads} KV heads, got {number} numbers")
    counts = list(zip(k, supports, strict=True))
    bounds = [0, *(head for head in range(1, heads) if counts[head] != counts[head - 1]), heads]
    outputs = [
        attend(
            query[:, first * group : end * group], *(x[:, first:end] for x in (key, value, scores)),
            k=counts[first][0], support=counts[first][1], **options,
        )
        for first, end in pairwise(bounds)
    ]  # fmt: skip
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
