"""Predict tiles by the page bound alone: nothing is trained."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.entmax.attention import entmax_thresholds
from hf_sparse.ops.entmax.blocks import Plan
from hf_sparse.ops.entmax.bound import excesses, missing, without_queries_at_padding
from hf_sparse.ops.entmax.inputs import Inputs, prepare
from hf_sparse.ops.entmax.layout import Layout, listed_layout
from hf_sparse.ops.tiles.tiles import Tiles, window_and_global

_FIRST = 4  # tiles that tau is taken from beside window and global tokens: they change the cost, not the attention


@torch.no_grad()
def bound_scores(
    query: Tensor,
    key: Tensor,
    *,
    size: int,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    rows: int | None = None,
    window: int = 1,
    global_tokens: int = 1,
    lag: int = 0,
    grouped: bool = False,
) -> Tensor:
    """Score tiles by how far their bound lies above tau over window and global tokens, for the query most in need.

    Args:
        query, key, alpha, scaling, causal: as in `entmax_attention`.
        size, rows: positions per tile, as in `hf_sparse.ops.tiles.tiles.tile_counts`.
        window, global_tokens: keys over which tau is taken, as in `window_and_global`; a window of at least 1.
        lag: how many positions before a tile the queries begin that describe it, as in
            `hf_sparse.ops.predictors.projections.tile_of_query`. With `rows - 1` no list depends on later queries.
        grouped: one score for all query heads of a group, the greatest.

    Returns:
        `[B, Hq, nq, nk]`, or `[B, Hkv, nq, nk]` if grouped, in float32 (float64 for float64), for `best_tiles`:
        positive where a tile may hold support, `-inf` where it has no allowed key or no query describes the row.

    Raises:
        ValueError: as `entmax_attention` and `window_and_global`, a window below 1, or a lag outside 0 to `rows - 1`.
    """
    if not 0 <= lag < max(rows or size, 1):
        raise ValueError(f"lag must be from 0 to {(rows or size) - 1} for tiles of {rows or size}, got {lag}")
    inputs = prepare(query, key, alpha, scaling, causal)
    layout, local_tiles = _local_tiles(inputs, size, rows, window, global_tokens, grouped)
    return _scores(inputs, layout, local_tiles, lag)


@torch.no_grad()
def bound_tiles(
    query: Tensor,
    key: Tensor,
    *,
    size: int,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
    rows: int | None = None,
    window: int = 1,
    global_tokens: int = 1,
    grouped: bool = False,
) -> Tiles:
    """List all tiles that may hold support, so that entmax over them is full entmax.

    tau over the window and the global tokens is a first lower bound. The few tiles that `bound_scores` puts before the
    others raise it, and every tile whose bound lies above that is taken.

    Args:
        query, key, valid, first_query: as in `entmax_attention`.
        size, alpha, scaling, causal, rows, window, global_tokens, grouped: as in `bound_scores`.

    Returns:
        Tiles with an index `[B, Hq, nq, m]`, or `[B, Hkv, nq, m]` if grouped; window and global tokens included.

    Raises:
        ValueError: as `bound_scores`.
    """
    inputs = prepare(query, key, alpha, scaling, causal, valid, first_query)
    layout, local_tiles = _local_tiles(inputs, size, rows, window, global_tokens, grouped)
    scores = _scores(inputs, layout, local_tiles, lag=0).masked_fill_(local_tiles.mask(layout.key_tiles), -torch.inf)
    best = scores.topk(min(_FIRST, layout.key_tiles), dim=-1)
    ranked = Tiles(best.indices.masked_fill(best.values <= 0, -1), size, rows)
    tiles = local_tiles.union(ranked)
    needed, _ = missing(inputs, layout, tiles, entmax_thresholds(inputs, Plan(layout, causal, valid, tiles)))
    return tiles.union(Tiles.of_mask(needed, size, rows))


def _local_tiles(
    inputs: Inputs, size: int, rows: int | None, window: int, global_tokens: int, grouped: bool
) -> tuple[Layout, Tiles]:
    """List the tiles of the window and the global tokens for every list.

    Raises:
        ValueError: a window below 1, or as `window_and_global`.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    query, key = inputs.query, inputs.key
    local_tiles = window_and_global(
        query.shape[2],
        key.shape[2],
        size,
        rows=rows,
        window=window,
        global_tokens=global_tokens,
        causal=inputs.causal,
        first_query=inputs.first_query,
        device=query.device,
    )
    heads = key.shape[1] if grouped else query.shape[1]
    return listed_layout(Tiles(local_tiles.index.expand(-1, heads, -1, -1), size, rows), inputs)


def _scores(inputs: Inputs, layout: Layout, local_tiles: Tiles, lag: int) -> Tensor:
    tau = without_queries_at_padding(
        entmax_thresholds(inputs, Plan(layout, inputs.causal, inputs.valid, local_tiles)), inputs
    )
    if lag:  # each query stands `lag` positions later, and no query at the first ones
        inputs = replace(inputs, query=F.pad(inputs.query, (0, 0, lag, 0))[:, :, : layout.queries])
        tau = F.pad(tau, (lag, 0), value=torch.inf)[..., : layout.queries]
    scores = tau.new_empty((layout.jobs, layout.key_tiles))
    for jobs, excess in excesses(inputs, layout, tau):
        scores[jobs] = excess.amax(1)
    return scores.view(layout.batch, layout.heads, layout.query_tiles, layout.key_tiles)
