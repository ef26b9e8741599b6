"""Predict tiles by mean keys on the GPU: means, choices of queries, lists; see `hf_sparse.ops.entmax.pooled`.

A program keeps the best tiles of each of its queries while it goes through the mean keys, so that no product is ever
written. What lies between the kernels is one byte per list and tile of keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.layout import Layout
from hf_sparse.ops.entmax.pooled import MOST_TILES
from hf_sparse.ops.entmax.triton.common import constants, load_rows, origin_of, scale_and_factor, scale_of
from hf_sparse.ops.tiles.tiles import Tiles
from hf_sparse.ops.triton.early import early, take_over
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, replayed
from hf_sparse.ops.triton.sizes import pieces

_ROWS, _MEANS = 64, 128  # queries and mean keys that a program multiplies at once
_WARPS, _STAGES = 4, 3
_CLEARED = 2048  # marks that a program sets to 0 at a time
_NONE = tl.constexpr(-(1 << 31) + 64)  # below it is no score


def takes_pooled(layout: Layout, pool: int, valid: Tensor | None) -> bool:
    """Tell whether the kernels list such tiles: powers of 2, and no padding but behind a causal text."""
    return valid is None and layout.key_tiles <= MOST_TILES and all(map(_is_power, (layout.rows, layout.size, pool)))


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class _Settings(NamedTuple):
    """Hold what a call of `fused_pooled_tiles` asks for, and the sizes of its `Layout`."""

    causal: bool
    choices: int
    pool: int
    window: int
    global_tokens: int
    heads: int
    rows: int
    query_size: int
    size: int
    lead: int
    query_tiles: int
    key_tiles: int


def fused_pooled_tiles(
    query: Tensor,
    key: Tensor,
    scaling: float | Tensor,
    layout: Layout,
    causal: bool,
    choices: int,
    pool: int,
    window: int,
    global_tokens: int,
) -> Tiles:
    """Return the lists.

    Args:
        query, key, scaling, causal: as in `hf_sparse.ops.entmax.entmax_attention`, of equal dtype and checked.
        layout: of the lists, see `takes_pooled`.
        choices, pool, window, global_tokens: as in `pooled_tiles`.
    """
    query, key = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key))
    scale, factor = scale_and_factor(scaling, 2.0)
    first = None if layout.first_query is None else layout.first_query.to(torch.int32).contiguous()
    settings = _Settings(
        causal, min(choices, layout.key_tiles), min(pool, layout.size), window, global_tokens, layout.heads,
        layout.rows, layout.query_size, layout.size, layout.lead, layout.query_tiles, layout.key_tiles,
    )  # fmt: skip
    with torch.cuda.device_of(query):  # where Triton launches
        index, lengths = replayed(_list_tiles, (query, key, scale, first), settings, factor)
    assert index is not None
    return Tiles(index, layout.size, layout.query_size, checked=True, lengths=lengths)


def _list_tiles(
    query: Tensor, key: Tensor, scale: Tensor | None, first: Tensor | None, settings: _Settings, factor: float
) -> tuple[Tensor | None, ...]:
    """Return `index` and `lengths` of `Tiles`.

    Args:
        scale: `[Hq]` float32, multiplies the products besides the factor; None for ones.
        first: `[B]` int32, position of the first query; None where the queries are the last positions.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys, device = key.shape[1], key.shape[2], query.device
    causal, choices, pool, window, always, lists, rows, query_size, size, lead, tiles, key_tiles = settings
    always = pieces(min(always, keys), size)
    each = size // pool
    means = key_tiles * each
    mean = empty((batch, kv_heads, means, dim), key.dtype, device)
    marks = empty((batch, lists, tiles, key_tiles), torch.uint8, device)
    fixed = constants(query, key, 0, causal)
    at_once = max(1, 64 // pool)
    grid = (batch * kv_heads * pieces(means, at_once),)
    launch(_means, grid)(
        key, mean, marks, keys, kv_heads, means, marks.numel(), pieces(marks.numel(), grid[0] * _CLEARED) * _CLEARED,
        *key.stride()[:3], D=dim, PADDED=fixed["PADDED"], POOL=pool, M=at_once, CLEARED=_CLEARED, **early(),
        num_warps=4,
    )  # fmt: skip
    before, after = (window - 1, 0) if causal else (window // 2, window - 1 - window // 2)
    # How many the tiles of the window, and the own one, are at most.
    near = min(key_tiles, max(0, before + after + rows - 1) // size + 2) if window else 1
    wide = query.dtype == torch.float32 or dim > 128
    taken = min(_ROWS, max(16, triton.next_power_of_2(tiles * rows)))
    block = max(32 if wide else _MEANS, each)
    launch(_choose, (pieces(tiles * rows, taken) * batch * heads,))(
        query, mean, scale, factor, first, marks, queries, keys, heads, lists, tiles, key_tiles, means, rows,
        query_size, lead, size, before, after, always, *query.stride()[:3], GROUP=fixed["GROUP"], D=dim,
        PADDED=fixed["PADDED"], CAUSAL=causal, PRECISION=fixed["PRECISION"], WINDOW=window > 0, POOL=pool, M=taken,
        N=block, EACH=each, CHOICES=choices, C=triton.next_power_of_2(choices), **early(), num_warps=_WARPS,
        num_stages=2 if wide else _STAGES,
    )  # fmt: skip
    width = min(key_tiles, near + always + rows * choices * (heads // lists))
    index = empty((batch, lists, tiles, width), torch.int64, device)
    lengths = empty((batch, lists, tiles), torch.int32, device)
    launch(_lists, (batch * lists * tiles,))(
        marks, first, index, lengths, queries, keys, lists, tiles, key_tiles, width, rows, query_size, lead, size,
        before, after, always, CAUSAL=causal, WINDOW=window > 0, T=max(16, triton.next_power_of_2(key_tiles)),
        **early(), num_warps=4,
    )  # fmt: skip
    return index, lengths


@triton.jit(do_not_specialize=["keys", "heads", "means", "marks", "cleared"])
def _means(
    K, Mean, Marks, keys, heads, means, marks, cleared, k_batch, k_head, k_row, D: tl.constexpr, PADDED: tl.constexpr,
    POOL: tl.constexpr, M: tl.constexpr, CLEARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write the means of M groups of keys, of those that exist, and zeros to a part of all marks."""
    take_over(EARLY)
    here = tl.program_id(0).to(tl.int64) * cleared
    for begin in range(0, cleared, CLEARED):
        mark = here + begin + tl.arange(0, CLEARED)
        tl.store(Marks + mark, tl.zeros([CLEARED], tl.uint8), mask=mark < marks)
    parts = tl.cdiv(means, M)
    row = (tl.program_id(0) // parts).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.program_id(0) % parts * M
    index = begin * POOL + tl.arange(0, M * POOL)
    dim = tl.arange(0, PADDED)
    k = load_rows(K, batch * k_batch + head * k_head + index.to(tl.int64) * k_row, index < keys, dim, D).to(tl.float32)
    group = begin + tl.arange(0, M)
    number = tl.minimum(keys - group * POOL, POOL).to(tl.float32)
    mean = tl.sum(tl.reshape(k, [M, POOL, PADDED]), 1) / tl.maximum(number, 1.0)[:, None]
    place = row * means + group
    wanted = (group < means)[:, None] & (dim < D)[None, :]
    tl.store(Mean + place[:, None] * D + dim[None, :], mean.to(Mean.dtype.element_ty), mask=wanted)


@triton.jit
def _near_tiles(
    First, batch, tile, queries, keys, tiles, rows, query_size, lead, size, before, after, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Return the own tile of a tile of queries, or of several, and the first and last one of its window."""
    begin = (origin_of(First, batch, queries, keys) + tile * rows - lead) // query_size * query_size
    own = tl.minimum(begin // size, tiles - 1)
    low, high = own, own
    if WINDOW:
        low = tl.minimum(own, tl.maximum(begin - before, 0) // size)
        if not CAUSAL:
            high = tl.maximum(own, tl.minimum((begin + query_size - 1 + after) // size, tiles - 1))
    return own, low, high


@triton.jit(do_not_specialize=["queries", "keys", "heads", "lists", "query_tiles", "tiles", "means", "rows",
                               "query_size", "lead", "size", "before", "after", "always"])  # fmt: skip
def _choose(
    Q, Mean, Scale, factor, First, Marks, queries, keys, heads, lists, query_tiles, tiles, means, rows, query_size,
    lead, size, before, after, always, q_batch, q_head, q_row, GROUP: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr, POOL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EACH: tl.constexpr, CHOICES: tl.constexpr, C: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Mark the tiles that M queries of a head choose. Programs with the most keys begin first."""
    parts = tl.cdiv(query_tiles * rows, M)
    pairs = tl.num_programs(0) // parts
    row = (tl.program_id(0) % pairs).to(tl.int64)
    batch, head = row // heads, row % heads
    place = (parts - 1 - tl.program_id(0) // pairs) * M + tl.arange(0, M)
    query_tile, index = place // rows, place - lead
    position = origin_of(First, batch, queries, keys) + index
    exists = (index >= 0) & (index < queries) & (position >= 0) & (position < keys) & (query_tile < query_tiles)
    dim = tl.arange(0, PADDED)
    q = load_rows(Q + batch * q_batch + head * q_head, index.to(tl.int64) * q_row, exists, dim, D)
    take_over(EARLY)
    exists &= tl.max(tl.abs(q.to(tl.float32)), 1) > 0
    scale = scale_of(Scale, factor, head)
    if scale < 0:
        q = -q
    _, low, high = _near_tiles(First, batch, query_tile, queries, keys, tiles, rows, query_size, lead, size, before,
                               after, CAUSAL, WINDOW)  # fmt: skip
    end = tl.max(tl.where(exists, low, 0), 0) if CAUSAL else tl.where(tl.max(exists.to(tl.int32), 0) > 0, tiles, 0)
    Mean += (batch * (heads // GROUP) + head // GROUP) * means * D
    lane, slot, in_block = tl.arange(0, N), tl.arange(0, C), tl.arange(0, N // EACH)
    # Places that are empty hold numbers below all scores, none twice; those that are too many are never the least.
    best = tl.zeros([M, C], tl.int32) + tl.where(slot < CHOICES, -(1 << 31) + 1 + slot, (1 << 31) - 1)[None, :]
    for start in range(always * EACH // N * N, end * EACH, N):
        k = load_rows(Mean, (start + lane).to(tl.int64) * D, start + lane < means, dim, D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        tile = start // EACH + in_block
        if not CAUSAL:  # groups behind the last key
            product = tl.where(((start + lane) * POOL < keys)[None, :], product, float("-inf"))
        score = tl.max(tl.reshape(product, [M, N // EACH, EACH]), 2)
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        bits = (bits & -4096) | tile[None, :]
        offered = (tile >= always)[None, :] & (tile[None, :] < low[:, None])
        if not CAUSAL:
            offered |= (tile >= always)[None, :] & (tile < tiles)[None, :] & (tile[None, :] > high[:, None])
        bits = tl.where(offered & exists[:, None], bits, -(1 << 31))
        largest = tl.max(bits, 1)
        rises = tl.max((largest > tl.min(best, 1)).to(tl.int32), 0)
        while rises > 0:
            least = tl.min(best, 1)
            change = (best == least[:, None]) & (largest > least)[:, None]
            best = tl.where(change, largest[:, None], best)
            bits = tl.where(bits == largest[:, None], -(1 << 31), bits)
            largest = tl.max(bits, 1)
            rises = tl.max((largest > tl.min(best, 1)).to(tl.int32), 0)
    chosen = (best > _NONE) & (slot < CHOICES)[None, :] & exists[:, None]
    share = heads // lists
    into = ((batch * lists + head // share) * query_tiles + query_tile) * tiles
    tl.store(Marks + into[:, None] + (best & 4095), tl.full([M, C], 1, tl.uint8), mask=chosen)


@triton.jit(do_not_specialize=["queries", "keys", "lists", "query_tiles", "tiles", "width", "rows", "query_size",
                               "lead", "size", "before", "after", "always"])  # fmt: skip
def _lists(
    Marks, First, Index, Lengths, queries, keys, lists, query_tiles, tiles, width, rows, query_size, lead, size, before,
    after, always, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, T: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write one list: tiles of the window and the first tokens, and those that were chosen."""
    job = tl.program_id(0).to(tl.int64)
    batch, query_tile = job // (query_tiles * lists), job % query_tiles
    own, low, high = _near_tiles(First, batch, query_tile, queries, keys, tiles, rows, query_size, lead, size, before,
                                 after, CAUSAL, WINDOW)  # fmt: skip
    take_over(EARLY)
    tile = tl.arange(0, T)
    keep = tl.load(Marks + job * tiles + tile, mask=tile < tiles, other=0) > 0
    keep |= (tile < always) | ((tile >= low) & (tile <= high))
    keep &= tile < tiles
    if CAUSAL:
        keep &= tile <= own
    keep = keep.to(tl.int32)
    slot = tl.cumsum(keep, 0) - keep
    Index += job * width
    tl.store(Index + slot, tile.to(tl.int64), mask=(keep > 0) & (slot < width))
    count = tl.sum(keep, 0)
    tl.store(Lengths + job, tl.minimum(count, width))
    tl.store(Index + tile, tl.full([T], -1, tl.int64), mask=(tile >= count) & (tile < width))
