"""Select a given number of key tiles per query tile by one rule for all predictors, so that sparsities are equal."""

import torch
from torch import Tensor

from hf_sparse.ops.tiles.allowed import allowed_tiles, tiles_of_valid
from hf_sparse.ops.tiles.tiles import Tiles, each_once, own_tiles

_INDEX_BITS = 24  # tiles that fit beside a score and a level in 64 bits


def best_tiles(
    scores: Tensor,
    count: int | Tensor,
    *,
    size: int,
    causal: bool,
    valid: Tensor | None = None,
    always: Tiles | None = None,
    rows: int | None = None,
    own: Tensor | None = None,
) -> Tiles:
    """Select the best `count` key tiles of every query tile.

    First the tile of the query itself, then those of `always`, then the others, each by score, compared in float32; of
    equal scores the lower index wins. Only allowed tiles are listed, so early rows of a causal graph list fewer.

    Args:
        scores: `[B, H, nq, nk]`, `B` may be 1; `-inf` for a tile that must not be listed unless `always` names it or
            the query lies in it.
        count: tiles per query tile in all, `always` included, at least 1; or int64 that broadcasts to `[B, H, nq]`,
            see `counts_for_sparsity`.
        size, rows: as in `tile_counts`.
        causal: as in `allowed_edges`.
        valid: `[B, Tk]` bool, or None. A tile of padding only is neither listed nor does it list any.
        always: tiles of window and global tokens, see `window_and_global`; `B` and `H` may be 1.
        own: `[nq]` or `[B, nq]` int64, see `own_tiles`; the last `nq` tiles by default, which they are where `rows` is
            `size`.

    Raises:
        ValueError: scores that are no `[B, H, nq, nk]` with `nq` at most `nk`, `count` below 1, or tiles
            of another size.
    """
    if scores.ndim != 4 or (own is None and scores.shape[2] > scores.shape[3]):
        raise ValueError(f"expected scores [B, H, nq, nk] with nq <= nk, got {tuple(scores.shape)}")
    listed, total = scores.shape[2:]
    if own is None:
        own = own_tiles(listed, total, 1)
    if own.shape[-1] != listed:
        raise ValueError(f"expected the own tiles of {listed} query tiles, got {own.shape[-1]}")
    if isinstance(count, int) and count < 1:
        raise ValueError(f"a query tile needs at least 1 key tile, got count={count}")
    tile_shape = (size if rows is None else rows, size)
    if always is not None and ((always.rows, always.size), always.index.shape[2]) != (tile_shape, listed):
        raise ValueError(
            f"expected always-attended tiles of {tile_shape[0]} by {size} for {listed} query tiles, "
            f"got tiles of {always.rows} by {always.size} for {always.index.shape[2]}"
        )
    valid_tiles = None
    if valid is not None:
        valid_tiles = tiles_of_valid(valid, size)
        if valid_tiles.shape[1] != total:
            raise ValueError(
                f"{valid.shape[1]} positions are {valid_tiles.shape[1]} tiles of {size}, got {total} tiles"
            )
    own = own.to(scores.device)
    tile = torch.arange(total, device=scores.device)
    first = (tile == own[..., None]).byte().unsqueeze(-3) * 2  # of [1, nq, nk] or [B, 1, nq, nk]
    if always is not None:
        first = first.maximum(always.mask(total).byte())
    if valid_tiles is not None:
        valid_tiles = valid_tiles.to(scores.device)
    eligible = ((scores > -torch.inf) | (first > 0)) & allowed_tiles(own, total, causal=causal, valid_tiles=valid_tiles)
    rank = _rank(scores, torch.where(eligible, first.to(torch.int8), -1))
    room = torch.as_tensor(count, device=scores.device)
    best = rank.topk(min(total, int(room.max())), dim=-1)
    fits = (tile[: best.indices.shape[-1]] < room[..., None]) & (best.values >= 0)
    return Tiles(each_once(best.indices.masked_fill(~fits, -1)), size, rows)


def step_tiles(
    scores: Tensor,
    count: int | Tensor,
    position: Tensor,
    *,
    size: int,
    rows: int,
    window: int,
    global_tokens: int,
) -> Tensor:
    """Select the tiles of one causal query per list as `best_tiles` does, in a fixed shape and waiting for nothing.

    Args:
        scores: `[B, H, 1, nk]`, see `best_tiles`.
        count: tiles of each list in all, at least 1, or int64 that broadcasts to `[B, H, 1]`; the own tile and those of
            window and global tokens included.
        position: `[B]` int64, where the queries stand.
        size, rows, window, global_tokens: as in `hf_sparse.ops.tiles.tiles.window_and_global`.

    Returns:
        `[B, H, 1, m]` int64, the best tile first, -1 behind the last; `m` is at most the count, or `nk` for a tensor.
    """
    total = scores.shape[3]
    tile, position = torch.arange(total, device=scores.device), position[:, None, None, None]
    own = tile == position // size
    always = own | (tile < -(-global_tokens // size))
    if window:
        always |= tile >= (position // rows * rows - (window - 1)).clamp(min=0) // size
    eligible = ((scores > -torch.inf) | always) & (tile <= position // size)
    rank = _rank(scores, torch.where(eligible, always.to(torch.int8) + own.to(torch.int8), -1))
    return highest_ranks(rank, count)


def highest_ranks(rank: Tensor, count: int | Tensor) -> Tensor:
    """Return the tiles of the highest ranks, `[B, H, 1, m]` int64, see `step_tiles`.

    Args:
        rank: `[B, H, 1, nk]` int64, negative for a tile that must not be listed.
        count: as in `step_tiles`.
    """
    total = rank.shape[3]
    if isinstance(count, int):
        best = rank.topk(min(total, count), dim=-1)
        return best.indices.masked_fill(best.values < 0, -1)
    best = rank.topk(total, dim=-1)
    place = torch.arange(total, device=rank.device)
    return best.indices.masked_fill((best.values < 0) | (place >= count[..., None]), -1)


def _rank(scores: Tensor, level: Tensor) -> Tensor:
    """Rank the tiles of a row by level, then score, then index: `[B, H, nq, nk]` int64, all different within a row.

    A tile of level -1 has a negative rank."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).long()  # adding 0 leaves one zero of the two there are
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31)
    last = torch.arange(scores.shape[-1], device=scores.device).flip(-1)
    return (level.long() << (32 + _INDEX_BITS)) + (ascending << _INDEX_BITS) + last


def counts_for_sparsity(reach: Tensor, sparsity: float) -> Tensor:
    """Count the key tiles per query tile at which a share of all allowed pairs of tiles is left out.

    Every row gets the same number, or all it has: linear cost, and early causal rows are dense. The total is that of
    the given sparsity, rounded to the nearest integer, unless every row having at least 1 tile needs more; the
    remainder of the division goes to the last rows.

    Args:
        reach: `[..., nq]` int64, allowed key tiles of each query tile; 0 for a query tile of padding.
        sparsity: share of allowed tile pairs that is not listed, at least 0 and below 1.

    Returns:
        `[..., nq]` int64, at least 1 where `reach` is.

    Raises:
        ValueError: a sparsity out of range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"tile sparsity must be at least 0 and below 1, got {sparsity}")
    # The highest level at which `min(reach, level)` sums to at most the target; some rows then get one tile more.
    target = ((1 - sparsity) * reach.sum(-1, keepdim=True).double()).round().long()
    level = torch.arange(1, int(reach.max()) + 1 if reach.numel() else 1, device=reach.device)
    sums = torch.minimum(reach[..., None], level).sum(-2)  # [..., levels]
    level = (sums <= target).sum(-1, keepdim=True).clamp(min=1)
    counts = torch.minimum(reach, level)
    left = target - counts.sum(-1, keepdim=True)
    more = reach > level
    place = more.flip(-1).cumsum(-1).flip(-1)
    return counts + (more & (place <= left)).long()
