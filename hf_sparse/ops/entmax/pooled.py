"""Predict tiles from mean queries: the products of one per tile with all keys stand for those of all its queries.

The mean of the queries of a tile is a query like others. A tile of keys counts by the largest z of its keys with it.
That takes `1 / rows` of the products of full attention, and nothing is learned; at equal numbers of tiles it finds
almost as much attention as the best tiles hold (docs/speed.md). Ours; means of blocks of queries choose blocks of keys
in SeerAttention (arXiv 2410.13276) and MInference (arXiv 2407.02490) too.

In a causal model a tile is described by queries that are known when its first one comes: as many as it has, up to and
with its first one, so that no list depends on later tokens. Only the first tile of a call, which has none before it, is
described by its own queries; at the beginning of a text it lists all there is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.entmax.inputs import Inputs, check, prepare
from hf_sparse.ops.entmax.layout import Layout, layout_of
from hf_sparse.ops.entmax.threshold import relative_threshold
from hf_sparse.ops.entmax.triton import takes_kernels
from hf_sparse.ops.predictors.projections import by_group
from hf_sparse.ops.tiles.select import best_tiles
from hf_sparse.ops.tiles.tiles import Tiles, window_and_global

_PAIRS = {"cpu": 1 << 24, "cuda": 1 << 28}  # of a mean query and a key, that are computed at once


@torch.no_grad()
def pooled_tiles(
    query: Tensor,
    key: Tensor,
    *,
    size: int,
    count: int,
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
    """List the tiles of the window and the global tokens, and those with the largest logits of mean queries.

    Args:
        query, key, alpha, scaling, causal, valid, first_query: as in `entmax_attention`. A query of zeros counts as
            none.
        size, rows: positions per tile, as in `hf_sparse.ops.tiles.tiles.tile_counts`.
        count: tiles of keys per tile of queries, and at least those of the window and the global tokens.
        window, global_tokens: as in `window_and_global`.
        grouped: one list for all query heads of a KV head, by the greatest of their z less
            thresholds.

    Returns:
        Tiles with an index `[B, Hq, nq, m]`, or `[B, Hkv, nq, m]` if grouped.

    Raises:
        ValueError: as `entmax_attention` and `window_and_global`, or a `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    check(query, key, alpha, scaling, valid, first_query)
    heads = key.shape[1] if grouped else query.shape[1]
    layout = layout_of(Inputs(query, key, 1.0, causal, valid, first_query), heads, size, size if rows is None else rows)
    count = max(count, least_count(layout, window, global_tokens, causal=causal))
    if takes_kernels(query, key, key):
        from hf_sparse.ops.entmax.triton.pooled import fused_pooled_tiles, takes_pooled  # Triton is beside CUDA only

        if takes_pooled(layout, valid):
            return fused_pooled_tiles(query, key, alpha, scaling, layout, causal, count, window, global_tokens)
    scores = pooled_scores(query, key, layout, alpha=alpha, scaling=scaling, causal=causal, valid=valid)
    always = window_and_global(
        query.shape[2],
        key.shape[2],
        size,
        rows=rows,
        window=window,
        global_tokens=global_tokens,
        causal=causal,
        first_query=first_query,
        device=query.device,
    )
    own = layout.own_tiles(query.device)
    return best_tiles(scores, count, size=size, rows=rows, causal=causal, valid=valid, always=always, own=own)


def least_count(layout: Layout, window: int, global_tokens: int, *, causal: bool) -> int:
    """Return how many tiles hold the window of a tile of queries and the first tokens, at most."""
    size, rows = layout.size, layout.query_size
    left, right = (window - 1, 0) if causal else (window // 2, window - 1 - window // 2)
    begins = range(0, size, rows)  # of a tile of queries in one of keys
    near = max((begin + rows - 1 + right) // size - (begin - left) // size for begin in begins) + 1 if window else 1
    return min(layout.key_tiles, near + -(-global_tokens // size))


@torch.no_grad()
def pooled_scores(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """Score all pairs of tiles, `[B, H, nq, nk]`, `-inf` where no mean query sees a key; see `pooled_tiles`.

    A score is the largest z less the threshold that entmax over these largest ones has: it is positive where the mean
    query attends to the tile, and so those of several heads compare.

    Args:
        layout: of the lists; `H` are its heads.
    """
    inputs = prepare(query, key, alpha, scaling, causal, valid, layout.first_query)
    mean, last = pooled_queries(inputs, layout)
    batch, heads = mean.shape[:2]
    share = heads // key.shape[1]
    exponent = inputs.exponent
    if isinstance(exponent, Tensor):
        exponent = exponent[:, None, None]
    padding = layout.key_tiles * layout.size - layout.keys
    position = torch.arange(layout.keys, device=query.device)
    step = max(1, _PAIRS.get(query.device.type, 1 << 24) // max(1, batch * heads * layout.keys))
    scores = []
    for part, end in zip(mean.split(step, 2), last.split(step, 1), strict=True):
        z = part.unflatten(1, (-1, share)) @ inputs.key.transpose(-1, -2)[:, :, None]
        sees = (position <= end[..., None]) if causal else (end[..., None] >= 0).expand(-1, -1, layout.keys)
        if valid is not None:
            sees = sees & valid[:, None]
        z = z.flatten(1, 2).masked_fill_(~sees[:, None], -torch.inf)
        peaks = F.pad(z, (0, padding), value=-torch.inf).unflatten(-1, (-1, layout.size)).amax(-1)
        top = peaks.amax(-1, keepdim=True)
        relative = peaks - top.clamp(min=torch.finfo(z.dtype).min)
        scores.append(relative - relative_threshold(relative.clone(), exponent))
    return by_group(torch.cat(scores, 2), layout.heads).amax(2)


def pooled_queries(inputs: Inputs, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the mean query of each tile, `[B, Hq, nq, D]`, and the position of the last one in it, `[B, nq]`.

    -1 stands for a tile that no query describes."""
    query, rows = inputs.query, layout.rows
    batch, _, queries, _ = query.shape
    position = torch.arange(queries, device=query.device) + (
        layout.keys - queries if layout.first_query is None else layout.first_query[:, None]
    )
    position = position.expand(batch, -1)
    exists = (query != 0).any(-1).any(1) & (position < layout.keys)
    if inputs.valid is not None:
        exists = exists & inputs.valid.gather(1, position.clamp(max=layout.keys - 1))
    tile = torch.arange(layout.query_tiles, device=query.device)
    begin = tile * rows - (tile > 0) * (rows - 1) * inputs.causal - layout.lead
    index = begin[:, None] + torch.arange(rows, device=query.device)
    inside = (index >= 0) & (index < queries)
    index = index.clamp(0, queries - 1)
    exists = exists[:, index] & inside  # [B, nq, rows]
    number = exists.sum(-1)[:, None, :, None].clamp(min=1)
    mean = (query[:, :, index] * exists[:, None, ..., None]).sum(3) / number
    return mean, position[:, index].masked_fill(~exists, -1).amax(-1)
