"""Attend by entmax: one function for all keys, some edges, or listed tiles.

    output_t = sum_j p_tj value_j,   p_t = entmax(scaling * <query_t, key_j> over the keys j that t may attend to)

A row whose support is among the keys that it may attend to equals full entmax: what is missing had a weight of 0. If
keys with a mass of d are missing, tau falls and every other weight grows or stays, by d in all: the distribution moves
by exactly 2d in L1. Treviso et al. 2022 (arXiv 2109.12188) for the former; the latter is ours.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse.ops.entmax.attention import attend
from hf_sparse.ops.entmax.blocks import BUFFER, Plan
from hf_sparse.ops.entmax.bound import complete_tiles, missing
from hf_sparse.ops.entmax.inputs import Inputs, check, fold, without_padding
from hf_sparse.ops.entmax.layout import layout_of, listed_layout
from hf_sparse.ops.entmax.step import Scales, attend_few, is_step
from hf_sparse.ops.entmax.triton import takes_kernels
from hf_sparse.ops.tiles.tiles import Tiles

_TILE = 64  # queries that share a pass over all keys


@dataclass(frozen=True)
class Certificate:
    """Hold what the page bound proves about entmax over listed tiles, and the statistics of its rows.

    Attributes:
        exact: `[B, Hq, Tq]` bool; True where no tile outside the given lists can hold support, so that the row is that
            of full entmax whether or not the lists were completed. A row that is not may be exact too. True for
            queries at padding.
        added: `[B, H, nq]` int64, how many tiles `complete` added to each list; zeros without it.
        tiles: the lists that were attended to.
        tau: `[B, Hq, Tq]` float32 or float64, thresholds of `(alpha - 1) * logit`; `-inf` for a row without a key.
        support: `[B, Hq, Tq]` int64, keys with a probability above 0.
    """

    exact: Tensor
    added: Tensor
    tiles: Tiles
    tau: Tensor
    support: Tensor


class CertifiedAttention(NamedTuple):
    """Hold the output of attention over listed tiles, and what is proved of it.

    Attributes:
        output: `[B, Hq, Tq, D]`, see `entmax_attention`.
        certificate: which rows are provably those of full entmax, and how they were made.
    """

    output: Tensor
    certificate: Certificate


def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
    edges: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attend with alpha-entmax to all allowed keys, or to those among them that a graph names.

    Allowed is a key that is no padding and, if causal, does not come after the query. Differentiable in query, key,
    value, and in alpha and scaling where they are tensors; the graph is a constant. Memory is linear in the length,
    backwards too; work is that of the tiles listed, or of all allowed keys. On a CUDA device Triton kernels do it,
    where they take the dtypes and sizes (`hf_sparse.ops.entmax.triton`).

    Args:
        query: `[B, Hq, Tq, D]`; the queries stand at the last `Tq` of the `Tk` positions.
        key, value: `[B, Hkv, Tk, D]` with `Hq` a multiple of `Hkv`, `Tq <= Tk`.
        alpha: in (1, 2], a number or `[Hq]`. 1.5 and 2 as numbers are the fastest.
        scaling: multiplies the logits, a number or `[Hq]`: learned logit scales go here.
        causal: whether a query sees the keys up to its own position, or all keys.
        valid: `[B, Tk]` bool, False for padding, wherever it is: never attended to, whatever it holds (even NaN).
        first_query: `[B]` int64, position of the first query of each text, where the queries are not the last `Tq`
            positions: for texts of different lengths, causal and with padding behind them, which is the future then.
            With `tiles` it is where a tile of queries begins, unless there is one query. Positions from `Tk` on hold
            no query.
        edges: bool, `[B, Hq, Tq, Tk]` or what expands to it; of these pairs, the allowed ones are attended.
        tiles: the key tiles of each query tile; of the keys in them, the allowed ones are attended. `H` is `Hq`, `Hkv`
            or 1, and `B` may be 1.

    Returns:
        `[B, Hq, Tq, D]` in the dtype of `query`, or autocast's where that is on; computed in float32 (float64 for
        float64). A query with no key, or at padding, gets zeros. The kernels multiply in the dtype of the tensors, and
        add up the gradients of keys and values in no fixed order.

    Raises:
        ValueError: shapes or dtypes that do not fit, alpha outside (1, 2], both `edges` and `tiles`, or lists that are
            not ascending or name tiles that do not exist.
    """
    _check(query, key, value, alpha, scaling, valid, first_query)
    if edges is not None and tiles is not None:
        raise ValueError("edges and tiles exclude each other: expected one of them, got both")
    few = is_step(query, key) and (tiles is None or query.shape[2] == 1)
    if edges is None and few and not _trains(query, key, value, alpha, scaling):
        return _attend_few(query, key, value, alpha, scaling, causal, valid, first_query, tiles)
    if edges is None and takes_kernels(query, key, value):
        from hf_sparse.ops.entmax.triton.fused import fused_attention  # Triton is there only beside a CUDA device

        return fused_attention(query, key, value, alpha, scaling, causal, valid, first_query, tiles)
    inputs = fold(query, key, alpha, scaling, causal, valid, first_query)
    value = value if valid is None else without_padding(value, valid)
    if tiles is not None:
        layout, lists = listed_layout(tiles, inputs)
        plan = Plan(layout, causal, valid, lists)
    else:
        if edges is not None:
            edges = _expanded(edges, (*query.shape[:3], key.shape[2]))
        tile = _dense_tile(query, key)
        plan = Plan(layout_of(inputs, key.shape[1], tile, tile), causal, valid, edges=edges)
    return attend(inputs, value, plan)[0].to(_output_dtype(query))


def _trains(*arguments: float | Tensor) -> bool:
    """Tell whether a backward could follow."""
    return torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in arguments)


def _attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None,
    first_query: Tensor | None,
    tiles: Tiles | None,
) -> Tensor:
    """Attend with few queries and without gradients, see `hf_sparse.ops.entmax.step`."""
    index, size, dtype = None, 1, _output_dtype(query)
    if tiles is not None:
        index = listed_layout(tiles, Inputs(query, key, 1.0, causal, valid, first_query))[1].index
        size = tiles.size
    if query.is_cuda:  # as autocast does for torch's own attention
        query, key, value = (part.to(dtype) for part in (query, key, value))
    scales = Scales.of(alpha, scaling, query)
    output = attend_few(
        query, key, value, scales, causal=causal, valid=valid, first_query=first_query, index=index, size=size
    )
    return output.to(dtype)


def certified_entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tiles,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
    complete: bool = False,
) -> CertifiedAttention:
    """Attend with alpha-entmax over listed tiles, and tell which rows are provably those of full entmax.

    Args:
        query, key, value, tiles, alpha, scaling, causal, valid, first_query: as for `entmax_attention`.
        complete: add the tiles that may hold support, so that every row is that of full entmax. The certificate is
            that of the lists as they were given, and says how many tiles were added.

    Raises:
        ValueError: as `entmax_attention`.
    """
    _check(query, key, value, alpha, scaling, valid, first_query)
    inputs = fold(query, key, alpha, scaling, causal, valid, first_query)
    value = value if valid is None else without_padding(value, valid)
    layout, given = listed_layout(tiles, inputs)
    used = given
    if complete:
        used, exact = complete_tiles(
            query, key, given, alpha=alpha, scaling=scaling, causal=causal, valid=valid, first_query=first_query
        )
    output, tau, support = attend(inputs, value, Plan(layout, causal, valid, used))
    if not complete:
        _, exact = missing(inputs, layout, given, tau)
    certificate = Certificate(exact, used.counts - given.counts, used, tau, support)
    return CertifiedAttention(output.to(_output_dtype(query)), certificate)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    scaling: float | Tensor,
    valid: Tensor | None,
    first_query: Tensor | None,
) -> None:
    """Raise `ValueError` for shapes and dtypes that do not fit, and for alpha outside (1, 2]."""
    check(query, key, alpha, scaling, valid, first_query)
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")


def _output_dtype(query: Tensor) -> torch.dtype:
    """Return autocast's dtype where that is on, and the dtype of the query elsewhere."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _expanded(edges: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        if edges.dtype == torch.bool:
            return edges.expand(shape)
    except RuntimeError:
        pass
    raise ValueError(f"edges must be bool [B, Hq, Tq, Tk] = {shape}, got {tuple(edges.shape)} {edges.dtype}")


def _dense_tile(query: Tensor, key: Tensor) -> int:
    """Return the number of queries to compute at a time when all keys are attended: fewer, the longer the text."""
    group = query.shape[1] // key.shape[1]
    return max(1, min(_TILE, BUFFER.get(query.device.type, 1 << 24) // max(1, group * key.shape[2])))
