"""SparseK attention: one function, several implementations.

Query t attends, in one softmax, to

    the sinks            the first `sinks` keys
    the window           the last `window` keys, its own included
    the selected         the `k` best-scored keys that are neither

so that up to `k + window + sinks` positions it is dense attention. A key enters the competition when it leaves the
window; scores do not depend on queries and are frozen, so a key that loses its place never returns and removing it
from the input changes nothing. That is why one function serves training, prefill, chunked prefill and decoding: the
queries are the last `Tq` of `Tk` positions, and evicted keys are simply not there.

Lou et al. 2024 (arXiv 2406.16747). Soft gates inside the softmax are ours: see `gates`.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.attention.dense import dense_sparsek_attention
from hf_sparse.ops.attention.tiled import tiled_sparsek_attention

Gates = Literal["hard", "soft"]
Implementation = Literal["auto", "tiled", "dense"]


def sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    k: int,
    window: int,
    sinks: int,
    scaling: float | None = None,
    gates: Gates = "hard",
    support: int | None = None,
    start: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attend to sinks, window and the `k` best-scored older keys.

    Args:
        query: `[B, Hq, Tq, D]`; the queries stand at the last `Tq` of the `Tk` positions.
        key, value: `[B, Hkv, Tk, D]` with `Hq` a multiple of `Hkv`, `Tq <= Tk`.
        scores: `[B, Hkv, Tk]` float32 or float64, one frozen score per key; of equal scores the lower index wins.
        k: selected keys per query, at least 1.
        window: most recent keys that are always attended, at least 1.
        sinks: first keys that are always attended, at least 0.
        scaling: multiplies the logits; `D ** -0.5` by default.
        gates: `"hard"` attends to exactly `k` selected keys (inference). `"soft"` (training) attends to the whole
            support of SparseK and multiplies the softmax weight of key j by its gate `clip(z_j - tau_t, 0, 1)`;
            window and sinks have gate 1. The gradient reaches the scores through the gates.
        support: with soft gates, project onto the best `support` scores only (at least `k`), which keeps the cost
            linear while score scales are small; `None` is exact SparseK.
        start: `[B]` int64, index of the first key of each row; earlier ones are padding, never attended. The output
            of padded queries is finite and meaningless.
        implementation: `"dense"` builds `Tq x Tk` masks and is the reference; `"tiled"` gathers the keys of a tile of
            queries and is linear in `Tq`; `"auto"` is `"tiled"`, or torch's own dense attention where the budget
            covers the whole sequence (unless scores are trained: they get their gradient, 0, from `"tiled"`).

    Returns:
        `[B, Hq, Tq, D]` in the dtype of `query`, or autocast's where that is on. Softmax and gates are computed in
        float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, `k`, `window`, `sinks` or `support` out of range, or an unknown `gates` or
            `implementation`.
    """
    for name, choice, known in (("gates", gates, Gates), ("implementation", implementation, Implementation)):
        if choice not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {choice!r}")
    _check(query, key, value, scores, k, window, sinks, support, start)
    if query.numel() == 0:
        return query.clone()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    support = k if gates == "hard" else support
    trains = gates == "soft" and scores.requires_grad
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for torch's own attention
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(device, enabled=False):
        if implementation == "auto" and key.shape[2] <= k + window + sinks and not trains:
            return _all_keys(query, key, value, scaling, start)
        attend = dense_sparsek_attention if implementation == "dense" else tiled_sparsek_attention
        return attend(query, key, value, scores, k, window, sinks, scaling, gates == "soft", support, start)


def _all_keys(query: Tensor, key: Tensor, value: Tensor, scaling: float, start: Tensor | None) -> Tensor:
    """Dense causal attention, by the kernel that the base model itself would use."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if start is not None or 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if start is not None:
            exists = torch.arange(keys, device=query.device) >= start[:, None]
            # A padded query sees itself: its output is never used, but it must not be NaN.
            mask = mask & (exists[:, None, None] | torch.eye(keys, dtype=torch.bool, device=query.device)[-queries:])
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None and queries > 1, scale=scaling, enable_gqa=grouped
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    k: int,
    window: int,
    sinks: int,
    support: int | None,
    start: Tensor | None,
) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"expected query [B, Hq, Tq, D] and key, value [B, Hkv, Tk, D], got {shapes}")
    batch, heads, queries, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim or heads % key.shape[1] or queries > key.shape[2]:
        raise ValueError(
            "query and key must share B and D, Hq must be a multiple of Hkv and Tq at most Tk, "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if scores.shape != key.shape[:3]:
        raise ValueError(f"scores must be [B, Hkv, Tk] = {tuple(key.shape[:3])}, got {tuple(scores.shape)}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores must be float32 or float64 (bfloat16 makes most of them tie), got {scores.dtype}")
    if start is not None and start.shape != (batch,):
        raise ValueError(f"start must be [B] = ({batch},), got {tuple(start.shape)}")
    for name, number, least in (("k", k, 1), ("window", window, 1), ("sinks", sinks, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if support is not None and support < k:
        raise ValueError(f"support must be at least k = {k}, got {support}")
