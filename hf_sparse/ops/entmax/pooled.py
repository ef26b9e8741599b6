"""Predict tiles from mean queries: the products of a few of them with all keys stand for those of all queries.

The queries of a tile are cut into groups of `pool` consecutive ones, and the mean of a group is a query like others. A
tile of keys counts by the largest z of its keys with a mean query, less the threshold that entmax over these largest
ones has: it is positive where the mean query attends to the tile. Of the scores of all groups of a tile of queries the
greatest counts. This takes `1 / pool` of the products of full attention, and nothing is learned. Ours; means of blocks
of queries choose blocks of keys in SeerAttention (arXiv 2410.13276) and MInference (arXiv 2407.02490) too.

A list is made from all queries of its tile, in a causal model too: which keys a query may attend to depends on later
queries of its tile. Lists made from earlier queries alone miss what single queries seek far away.
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
    pool: int,
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
        pool: queries per group; a tile that has fewer is one group.
        window, global_tokens: as in `window_and_global`.
        grouped: one list for all query heads of a KV head, by the greatest of their z less
            thresholds.

    Returns:
        Tiles with an index `[B, Hq, nq, m]`, or `[B, Hkv, nq, m]` if grouped.

    Raises:
        ValueError: as `entmax_attention` and `window_and_global`, or a `count` or `pool` below 1.
    """
    if count < 1 or pool < 1:
        raise ValueError(f"count and pool must be at least 1, got {count} and {pool}")
    check(query, key, alpha, scaling, valid, first_query)
    heads = key.shape[1] if grouped else query.shape[1]
    layout = layout_of(Inputs(query, key, 1.0, causal, valid, first_query), heads, size, size if rows is None else rows)
    count = max(count, least_count(layout, window, global_tokens, causal=causal))
    if takes_kernels(query, key, key):
        from hf_sparse.ops.entmax.triton.pooled import fused_pooled_tiles, takes_pooled  # Triton is beside CUDA only

        if takes_pooled(layout, pool, valid):
            return fused_pooled_tiles(query, key, alpha, scaling, layout, causal, count, pool, window, global_tokens)
    scores = pooled_scores(query, key, layout, pool=pool, alpha=alpha, scaling=scaling, causal=causal, valid=valid)
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
    pool: int,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """Score all pairs of tiles, `[B, H, nq, nk]`, `-inf` where no mean query sees a key; see `pooled_tiles`.

    Args:
        layout: of the lists; `H` are its heads.
    """
    inputs = prepare(query, key, alpha, scaling, causal, valid, layout.first_query)
    mean, last = pooled_queries(inputs, layout, pool)
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
    joined = torch.cat(scores, 2).unflatten(2, (layout.query_tiles, -1)).amax(3)
    return by_group(joined, layout.heads).amax(2)


def pooled_queries(inputs: Inputs, layout: Layout, pool: int) -> tuple[Tensor, Tensor]:
    """Return the mean query of each group, `[B, Hq, n, D]`, and the position of its last query, `[B, n]`.

    -1 stands for a group without a query. `n` is `nq` times the groups of a tile."""
    query, rows = inputs.query, layout.rows
    batch, _, queries, _ = query.shape
    position = torch.arange(queries, device=query.device) + (
        layout.keys - queries if layout.first_query is None else layout.first_query[:, None]
    )
    position = position.expand(batch, -1)
    exists = (query != 0).any(-1).any(1) & (position < layout.keys)
    if inputs.valid is not None:
        exists = exists & inputs.valid.gather(1, position.clamp(max=layout.keys - 1))
    pool = min(pool, rows)
    begin = torch.arange(0, layout.query_tiles * rows, rows, device=query.device)[:, None, None] - layout.lead
    within = torch.arange(-(-rows // pool) * pool, device=query.device).view(-1, pool)  # of the rows of a tile
    index = (begin + within).flatten(0, 1)  # [n, pool]
    within = within.expand(layout.query_tiles, -1, -1).flatten(0, 1)
    inside = (index >= 0) & (index < queries) & (within < rows)
    index = index.clamp(0, queries - 1)
    exists = exists[:, index] & inside  # [B, n, pool]
    number = exists.sum(-1)[:, None, :, None].clamp(min=1)
    mean = (query[:, :, index] * exists[:, None, ..., None]).sum(3) / number
    return mean, position[:, index].masked_fill(~exists, -1).amax(-1)
