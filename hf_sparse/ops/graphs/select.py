"""A given number of key tiles per query tile, whatever the predictor: one rule, so that sparsities are equal."""

from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sparse.ops.graphs.allowed import allowed_tiles, tiles_of_valid
from hf_sparse.ops.graphs.tiles import Tiles, each_once

Spread = Literal["constant", "proportional"]


def best_tiles(
    scores: Tensor,
    count: int | Tensor,
    *,
    size: int,
    causal: bool,
    valid: Tensor | None = None,
    always: Tiles | None = None,
) -> Tiles:
    """The best `count` key tiles of every query tile.

    First the tile of the query itself, then those of `always`, then the others, each by score; of equal scores the
    lower index wins. Only allowed tiles are listed, so early rows of a causal graph list fewer.

    Args:
        scores: `[B, H, nq, nk]`, `B` may be 1; `-inf` for a tile that must not be listed unless `always` or the
            diagonal names it.
        count: tiles per query tile in all, `always` included, at least 1; or int64 that broadcasts to `[B, H, nq]`,
            see `tiles_for_sparsity`.
        size: positions per tile.
        causal: as in `allowed_edges`.
        valid: `[B, Tk]` bool, or None. A tile of padding only is neither listed nor does it list any.
        always: tiles of window and global tokens, see `window_and_global`; `B` and `H` may be 1.

    Raises:
        ValueError: scores that are no `[B, H, nq, nk]` with `nq <= nk`, `count` below 1, or tiles of another size.
    """
    if scores.ndim != 4 or scores.shape[2] > scores.shape[3]:
        raise ValueError(f"expected scores [B, H, nq, nk] with nq <= nk, got {tuple(scores.shape)}")
    if isinstance(count, int) and count < 1:
        raise ValueError(f"a query tile needs at least 1 key tile, got count={count}")
    if always is not None and (always.size != size or always.index.shape[2] != scores.shape[2]):
        raise ValueError(
            f"expected always-attended tiles of {size} for {scores.shape[2]} query tiles, "
            f"got tiles of {always.size} for {always.index.shape[2]}"
        )
    listed, total = scores.shape[2:]
    valid_tiles = None
    if valid is not None:
        valid_tiles = tiles_of_valid(valid, size)
        if valid_tiles.shape[1] != total:
            raise ValueError(
                f"{valid.shape[1]} positions are {valid_tiles.shape[1]} tiles of {size}, got {total} tiles"
            )
    tile = torch.arange(total, device=scores.device)
    diagonal = tile == tile[total - listed :, None]
    first = diagonal.byte() * 2
    if always is not None:
        first = first.maximum(always.mask(total).byte())
    eligible = ((scores > -torch.inf) | (first > 0)) & allowed_tiles(
        listed, total, causal=causal, valid_tiles=valid_tiles
    ).to(scores.device)
    level = torch.where(eligible, first.to(torch.int8), -1)
    scores = scores.expand_as(level)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, level.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    room = torch.as_tensor(count, device=scores.device)
    width = min(total, int(room.max()))
    chosen = order[..., :width]
    fits = (tile[:width] < room[..., None]) & (level.gather(-1, chosen) >= 0)
    return Tiles(each_once(chosen.masked_fill(~fits, -1)), size)


def tiles_for_sparsity(
    sparsity: float,
    queries_listed: int,
    tiles: int,
    *,
    causal: bool,
    spread: Spread = "constant",
    valid_tiles: Tensor | None = None,
) -> Tensor:
    """Key tiles per query tile at which a share of all allowed pairs of tiles is left out.

    The total is that of the wanted sparsity, rounded to the nearest integer, unless every row having at least 1 tile
    needs more.

    Args:
        sparsity: share of allowed tile pairs that is not listed, at least 0 and below 1.
        queries_listed, tiles: `nq` and `nk`, see `tile_counts`.
        causal: as in `allowed_edges`.
        spread: `"constant"` gives every row the same number, or all it has: linear cost, and early causal rows are
            dense. What does not divide goes to the last rows. `"proportional"` gives every row its share; the number
            of a row then depends on earlier rows only, as generation with a cache needs.
        valid_tiles: `[B, nk]` bool, or None; see `tiles_of_valid`.

    Returns:
        `[nq]` int64, or `[B, 1, nq]` with `valid_tiles`; 0 only for a row of padding.

    Raises:
        ValueError: a sparsity out of range, or an unknown `spread`.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"tile sparsity must be at least 0 and below 1, got {sparsity}")
    if spread not in get_args(Spread):
        raise ValueError(f"spread must be one of {', '.join(map(repr, get_args(Spread)))}, got {spread!r}")
    exists = torch.ones(tiles, dtype=torch.int64) if valid_tiles is None else valid_tiles[:, None].long()
    reach = (exists.cumsum(-1) if causal else exists.sum(-1, keepdim=True)) * exists  # [..., nk] allowed tiles
    if spread == "constant":
        reach = reach[..., tiles - queries_listed :]
        return _constant(reach, _share(reach.sum(-1, keepdim=True), sparsity))
    # used_i = max(share_i, used_{i - 1} + 1), written without a loop.
    rows = exists.cumsum(-1)
    used = rows + (_share(reach.cumsum(-1), sparsity) - rows).cummax(-1).values.clamp(min=0)
    return used.diff(dim=-1, prepend=torch.zeros_like(used[..., :1]))[..., tiles - queries_listed :]


def _share(pairs: Tensor, sparsity: float) -> Tensor:
    return ((1 - sparsity) * pairs.double()).round().long()


def _constant(reach: Tensor, wanted: Tensor) -> Tensor:
    """The highest level `c` at which `min(reach, c)` sums to at most `wanted`, and one more for some rows."""
    level = torch.arange(1, int(reach.max()) + 1 if reach.numel() else 1, device=reach.device)
    sums = torch.minimum(reach[..., None], level).sum(-2)  # [..., levels]
    level = (sums <= wanted).sum(-1, keepdim=True).clamp(min=1)
    counts = torch.minimum(reach, level)
    left = wanted - counts.sum(-1, keepdim=True)
    more = reach > level
    place = more.flip(-1).cumsum(-1).flip(-1)
    return counts + (more & (place <= left)).long()
