"""Check the arguments of entmax attention, and fold all scales into the query."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.ops.entmax.transform import check_alpha
from hf_sparse.ops.tiles.allowed import check_valid


@dataclass(frozen=True)
class Inputs:
    """Hold the arguments after the checks. Padding is zero: a weight of 0 times NaN would be NaN."""

    query: Tensor  # [B, Hq, Tq, D] float32 or float64, times scaling and alpha - 1: its products with keys are z
    key: Tensor  # [B, Hkv, Tk, D]
    exponent: float | Tensor  # 1 / (alpha - 1), a number or [Hq]
    causal: bool
    valid: Tensor | None  # [B, Tk] bool
    first_query: Tensor | None  # [B] int64, position of the first query; the last Tq positions by default


def prepare(
    query: Tensor,
    key: Tensor,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
) -> Inputs:
    """Raise `ValueError` for what does not fit; see `entmax_attention`."""
    check(query, key, alpha, scaling, valid, first_query)
    return fold(query, key, alpha, scaling, causal, valid, first_query)


def fold(
    query: Tensor,
    key: Tensor,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None,
    first_query: Tensor | None,
) -> Inputs:
    """Fold all scales into the query, for arguments that have been checked."""
    if valid is not None:
        query = without_padding(query, valid[:, key.shape[2] - query.shape[2] :])
        key = without_padding(key, valid)
    wide = torch.promote_types(query.dtype, torch.float32)
    alpha = alpha.to(wide) if isinstance(alpha, Tensor) else float(alpha)
    scale = scaling * (alpha - 1)
    if isinstance(scale, Tensor):
        scale = scale.to(wide)[:, None, None]
    return Inputs(query.to(wide) * scale, key.to(wide), 1 / (alpha - 1), causal, valid, first_query)


def check(
    query: Tensor,
    key: Tensor,
    alpha: float | Tensor,
    scaling: float | Tensor,
    valid: Tensor | None,
    first_query: Tensor | None,
) -> None:
    """Raise `ValueError` for what does not fit; see `entmax_attention`."""
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"expected query [B, Hq, Tq, D] and key [B, Hkv, Tk, D], got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, heads, queries, dim = query.shape
    placed = queries <= key.shape[2] if first_query is None else first_query.shape == (batch,)
    fits = key.shape[0] == batch and key.shape[3] == dim and placed
    if not fits or not key.shape[1] or heads % key.shape[1]:
        raise ValueError(
            "query and key must share B and D, Hq must be a multiple of Hkv and Tq at most Tk, "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
            + ("" if first_query is None else f" and first_query {tuple(first_query.shape)}")
        )
    if valid is not None and first_query is not None:
        raise ValueError(
            "valid marks padding among queries that are the last tokens: expected no first_query, got both"
        )
    for name, number in (("alpha", alpha), ("scaling", scaling)):
        if isinstance(number, Tensor) and number.shape != (heads,):
            raise ValueError(f"{name} must be a number or [Hq] = ({heads},), got {tuple(number.shape)}")
    check_alpha(alpha)
    if valid is not None:
        check_valid(valid, key.shape[2])
        if len(valid) != batch:
            raise ValueError(f"valid must be [B, Tk] = ({batch}, {key.shape[2]}), got {tuple(valid.shape)}")


def without_padding(tensor: Tensor, valid: Tensor) -> Tensor:
    """Put zeros in place of padding `[B, H, T, X]`."""
    return tensor.masked_fill(~valid[:, None, :, None], 0.0)
