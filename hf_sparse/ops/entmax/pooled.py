"""Predict tiles from mean keys: the products of every query with a few of them stand for those with all keys.

The keys of a tile are cut into groups of `pool` consecutive ones, and the mean of a group is a key like others. Every
query chooses the tiles with the largest products, among those that are not listed anyway, and a tile of queries attends
to what any of its queries chose. This takes `1 / pool` of the products of full attention, and nothing is learned. Ours;
means of blocks choose blocks of keys in SeerAttention (arXiv 2410.13276) and MInference (arXiv 2407.02490) too, where
the queries are averaged as well. Means of queries were tried instead of means of keys: what a single query seeks far
away is lost in them.

What a query chooses depends on no later token. A tile of queries shares its list, in a causal model too: which keys a
query may attend to depends on later queries of its tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.entmax.inputs import Inputs, check
from hf_sparse.ops.entmax.layout import Layout, layout_of
from hf_sparse.ops.entmax.triton import takes_kernels
from hf_sparse.ops.predictors.projections import by_group
from hf_sparse.ops.tiles.allowed import allowed_tiles, tiles_of_valid
from hf_sparse.ops.tiles.tiles import Tiles, window_and_global

MOST_TILES = 4096  # tiles of keys whose number stands in the last bits of a score
_PAIRS = {"cpu": 1 << 24, "cuda": 1 << 28}  # of a query and a mean key, that are computed at once
_NONE = -(1 << 31)  # below every score


@torch.no_grad()
def pooled_tiles(
    query: Tensor,
    key: Tensor,
    *,
    size: int,
    choices: int,
    pool: int,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
    rows: int | None = None,
    window: int = 1,
    global_tokens: int = 1,
    grouped: bool = False,
) -> Tiles:
    """List the tiles of the window and the global tokens, and those that queries choose by products with mean keys.

    Args:
        query, key, scaling, causal, valid, first_query: as in `entmax_attention`. A query of zeros chooses nothing.
        size, rows: positions per tile, as in `hf_sparse.ops.tiles.tiles.tile_counts`.
        choices: tiles of keys that each query chooses, besides those of the window and the global tokens.
        pool: keys per group; a tile that has fewer is one group.
        window, global_tokens: as in `window_and_global`.
        grouped: one list for all query heads of a KV head, with the choices of all.

    Returns:
        Tiles with an index `[B, Hq, nq, m]`, or `[B, Hkv, nq, m]` if grouped.

    Raises:
        ValueError: as `entmax_attention` and `window_and_global`, or `choices` or `pool` below 1.
    """
    if choices < 1 or pool < 1:
        raise ValueError(f"choices and pool must be at least 1, got {choices} and {pool}")
    check(query, key, 1.5, scaling, valid, first_query)
    heads = key.shape[1] if grouped else query.shape[1]
    layout = layout_of(Inputs(query, key, 1.0, causal, valid, first_query), heads, size, size if rows is None else rows)
    if takes_kernels(query, key, key):
        from hf_sparse.ops.entmax.triton.pooled import fused_pooled_tiles, takes_pooled  # Triton is beside CUDA only

        if takes_pooled(layout, pool, valid):
            return fused_pooled_tiles(query, key, scaling, layout, causal, choices, pool, window, global_tokens)
    known = window_and_global(
        query.shape[2],
        key.shape[2],
        size,
        rows=rows,
        window=window,
        global_tokens=global_tokens,
        causal=causal,
        first_query=first_query,
        device=query.device,
    ).mask(layout.key_tiles)
    own = layout.own_tiles(query.device)
    known = known | (torch.arange(layout.key_tiles, device=query.device) == own[..., None]).unsqueeze(-3)
    valid_tiles = None if valid is None else tiles_of_valid(valid, size)
    reach = allowed_tiles(own, layout.key_tiles, causal=causal, valid_tiles=valid_tiles)
    chosen = chosen_tiles(query, key, layout, reach & ~known, choices=choices, pool=pool, scaling=scaling, valid=valid)
    return Tiles.of_mask((chosen | known) & reach, size, rows)


@torch.no_grad()
def chosen_tiles(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    offered: Tensor,
    *,
    choices: int,
    pool: int,
    scaling: float | Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Mark the tiles that queries choose, `[B, H, nq, nk]` bool; see `pooled_tiles`.

    Args:
        layout: of the lists; `H` are its heads.
        offered: `[B, 1, nq, nk]` bool, where `B` may be 1: the tiles that a tile of queries may choose.
    """
    (batch, heads, queries, _), keys, tiles = query.shape, key.shape[2], layout.key_tiles
    dtype = torch.promote_types(query.dtype, torch.float32)
    mean, exists = mean_keys(key.to(dtype), layout, pool, valid)
    chooses = (query != 0).any(-1)  # [B, Hq, Tq]
    position = torch.arange(queries, device=query.device) + (
        keys - queries if layout.first_query is None else layout.first_query[:, None]
    )
    position = position.expand(batch, -1)
    real = position < keys
    if valid is not None:
        real = real & valid.gather(1, position.clamp(max=keys - 1))
    chooses &= real[:, None]
    number = (torch.arange(queries, device=query.device) + layout.lead) // layout.rows  # of the tile of each query
    scale = torch.as_tensor(scaling, dtype=dtype, device=query.device).reshape(-1, 1, 1)
    chosen = torch.zeros((batch, heads, layout.query_tiles, tiles), dtype=torch.uint8, device=query.device)
    offered = offered.expand(batch, 1, -1, -1)
    step = max(1, _PAIRS.get(query.device.type, 1 << 24) // max(1, batch * heads * mean.shape[2]))
    for part in torch.arange(queries, device=query.device).split(step):
        grouped = query[:, :, part].to(dtype).unflatten(1, (key.shape[1], -1))
        product = (grouped @ mean[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale
        product = product.masked_fill_(~exists[:, None, None], -torch.inf)
        score = product.unflatten(-1, (tiles, -1)).amax(-1)
        allowed = offered[:, :, number[part]] & chooses[:, :, part, None] & (score > -torch.inf)
        best = _ordered(score).masked_fill(~allowed, _NONE).topk(min(choices, tiles), dim=-1)
        best_tile = torch.where(best.values > _NONE, best.values & (MOST_TILES - 1), tiles)
        if tiles > MOST_TILES:
            best_tile = torch.where(best.values > _NONE, best.indices, tiles)
        marks = chosen.new_zeros((*best_tile.shape[:3], tiles + 1)).scatter_(-1, best_tile, 1)[..., :tiles]
        place = number[part][None, None, :, None].expand(marks.shape)
        chosen.scatter_reduce_(2, place, marks, "amax")
    return by_group(chosen, layout.heads).amax(2) > 0


def mean_keys(key: Tensor, layout: Layout, pool: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean key of each group, `[B, Hkv, n, D]`, and whether it has any key, `[B, n]` bool.

    `n` is `nk` times the groups of a tile."""
    padding = layout.key_tiles * layout.size - layout.keys
    pool = min(pool, layout.size)
    exists = key.new_ones((len(key), layout.keys)) if valid is None else valid.to(key.dtype)
    key = key.masked_fill(exists[:, None, :, None] == 0, 0.0)
    each = -(-layout.size // pool) * pool - layout.size  # a last group of a tile may be smaller

    def grouped(tensor: Tensor) -> Tensor:  # [..., Tk, X]
        whole = F.pad(tensor, (0, 0, 0, padding)).unflatten(-2, (layout.key_tiles, layout.size))
        return F.pad(whole, (0, 0, 0, each)).flatten(-3, -2).unflatten(-2, (-1, pool)).sum(-2)

    number = grouped(exists[..., None])  # [B, n, 1]
    return grouped(key) / number[:, None].clamp(min=1), number[..., 0] > 0


def _ordered(score: Tensor) -> Tensor:
    """Return int32 numbers that are ordered as scores `[..., nk]` are, with the number of the tile in the last bits.

    So no two are equal: of scores that agree in 11 bits of their mantissa the later tile is preferred."""
    bits = score.float().contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tile = torch.arange(score.shape[-1], device=score.device, dtype=torch.int32)
    return (bits & -MOST_TILES) | tile if score.shape[-1] <= MOST_TILES else bits
