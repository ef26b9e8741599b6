"""State a problem of SparseK attention once, for the functions that solve it in different ways."""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Hold the tensors and settings of one call of `sparsek_attention`, checked and without padding's values.

    Attributes:
        query: `[B, Hq, Tq, D]`; the queries stand at the last `Tq` of the `Tk` positions.
        key, value: `[B, Hkv, Tk, D]`.
        scores: `[B, Hkv, Tk]` float32 or float64.
        k: selected keys per query.
        window: keys around a query that are always attended.
        sinks: first keys of a row that are always attended.
        scaling: multiplies the logits.
        soft: whether gates are those of SparseK, with a gradient for the scores, and not 0 or 1.
        support: the best-scored keys that can have a gate above 0; `None` for all. With hard gates it is `k`.
        start: `[B]` int64, index of the first key of each row that is no padding; `None` for 0.
        causal: whether a query sees the keys up to its own position only.
        of_heads: `k` and `support` of each KV head where they differ; the two above are the largest then. `None` where
            all heads have the same.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    k: int
    window: int
    sinks: int
    scaling: float
    soft: bool
    support: int | None
    start: Tensor | None
    causal: bool
    of_heads: tuple[tuple[int, int | None], ...] | None = None

    @property
    def least_k(self) -> int:
        """Return the selected keys per query of the KV head that has the fewest."""
        return self.k if self.of_heads is None else min(k for k, _ in self.of_heads)

    @property
    def first(self) -> Tensor:
        """Return the first key of each row that is no padding, `[B]` int64: `start`, or zeros."""
        if self.start is not None:
            return self.start
        return torch.zeros(self.key.shape[0], dtype=torch.int64, device=self.key.device)

    @property
    def trained_scores(self) -> Tensor:
        """Return the scores, detached where nothing learns from them."""
        return self.scores if self.soft else self.scores.detach()


def check_inputs(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, start: Tensor | None, causal: bool) -> None:
    """Check shapes and dtypes of the tensors of a call.

    Raises:
        ValueError: they do not fit.
    """
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"expected query [B, Hq, Tq, D] and key, value [B, Hkv, Tk, D], got {shapes}")
    batch, heads, queries, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim or heads % key.shape[1] or queries > key.shape[2]:
        raise ValueError(
            "query and key must share B and D, Hq must be a multiple of Hkv and Tq at most Tk, "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if not causal and queries != key.shape[2]:
        raise ValueError(
            f"without causal order every token is query and key: Tq must be Tk, got {queries} and {key.shape[2]}"
        )
    if scores.shape != key.shape[:3]:
        raise ValueError(f"scores must be [B, Hkv, Tk] = {tuple(key.shape[:3])}, got {tuple(scores.shape)}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores must be float32 or float64 (bfloat16 makes most of them tie), got {scores.dtype}")
    if start is not None and start.shape != (batch,):
        raise ValueError(f"start must be [B] = ({batch},), got {tuple(start.shape)}")


def check_budget(k: int, support: int | None, window: int, sinks: int, causal: bool) -> None:
    """Check the numbers of keys of a call.

    Raises:
        ValueError: one is out of range.
    """
    for name, number, least in (("k", k, 1 if causal else 0), ("window", window, 1), ("sinks", sinks, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if support is not None and support < k:
        raise ValueError(f"support must be at least k = {k}, got {support}")
