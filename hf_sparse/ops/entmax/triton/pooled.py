"""Predict tiles by mean queries on the GPU: means, largest products, lists; see `hf_sparse.ops.entmax.pooled`.

What lies between the kernels is one number per mean query and tile of keys. Lists are made without a sort: the least
score that is listed is found by halving the range of its bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.layout import Layout
from hf_sparse.ops.entmax.triton.common import (
    constants,
    exponent_of,
    kind_of,
    load_rows,
    newton_step,
    origin_of,
    per_head,
    powers,
)
from hf_sparse.ops.tiles.tiles import Tiles

MOST_TILES = 4096  # tiles of keys that a list is chosen from
STEPS = 6  # of Newton's method, for the threshold of a mean query
_CHUNK = 16  # blocks of keys of a program
_ROWS, _KEYS, _WARPS, _STAGES = 64, 128, 4, 3  # of a program that multiplies mean queries with keys
_PAIRS = 1 << 25  # of a mean query and a tile of keys, whose largest products are held at once
_LEAST_TILES = 64  # of queries that are listed at once, however many such pairs they have


def takes_pooled(layout: Layout, pool: int, valid: Tensor | None) -> bool:
    """Tell whether the kernels list such tiles: powers of 2, and no padding but behind a causal text."""
    return valid is None and layout.key_tiles <= MOST_TILES and all(map(_is_power, (layout.rows, layout.size, pool)))


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def fused_pooled_tiles(
    query: Tensor,
    key: Tensor,
    alpha: float | Tensor,
    scaling: float | Tensor,
    layout: Layout,
    causal: bool,
    count: int,
    pool: int,
    window: int,
    global_tokens: int,
) -> Tiles:
    """Return the lists.

    Args:
        query, key, alpha, scaling, causal: as in `hf_sparse.ops.entmax.entmax_attention`, of equal dtype and checked.
        layout: of the lists, see `takes_pooled`.
        count: tiles of a list, those of the window and the global tokens included.
        pool, window, global_tokens: as in `pooled_tiles`.
    """
    batch, heads, queries, dim = query.shape
    keys, device = key.shape[2], query.device
    query, key = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key))
    kind = kind_of(1.0 / (alpha - 1.0))
    scale = per_head(scaling * (alpha - 1), heads, device)
    exponent = None if kind else per_head(1 / (alpha - 1), heads, device)
    rows, size, tiles = layout.rows, layout.size, layout.query_tiles
    first = None if layout.first_query is None else layout.first_query.to(torch.int32)
    pool = min(pool, rows)
    each = rows // pool
    groups = tiles * each
    mean = torch.empty((batch, heads, groups, dim), dtype=query.dtype, device=device)
    last = torch.empty((batch, heads, groups), dtype=torch.int32, device=device)
    fixed = constants(query, key, kind, causal)
    at_once = max(1, 64 // pool)
    _means[(batch * heads * triton.cdiv(groups, at_once),)](
        query, scale, first, mean, last, queries, keys, heads, groups, layout.lead, *query.stride()[:3], D=dim,
        PADDED=fixed["PADDED"], POOL=pool, M=at_once, num_warps=4,
    )  # fmt: skip
    width = min(layout.key_tiles, count)
    index = torch.empty((batch, layout.heads, tiles, width), dtype=torch.int64, device=device)
    part = min(tiles, max(_LEAST_TILES, _PAIRS // (batch * heads * each * layout.key_tiles)))
    peaks = torch.empty((batch, heads, part * each, layout.key_tiles), dtype=torch.float32, device=device)
    wide = query.dtype == torch.float32 or dim > 128
    taken = min(_ROWS, max(16, triton.next_power_of_2(part * each)))
    block = max(64 if wide else _KEYS, size)
    before, after = (window - 1, 0) if causal else (window // 2, window - 1 - window // 2)
    for begin in range(0, tiles, part):
        listed = min(part, tiles - begin)
        _peaks[triton.cdiv(listed * each, taken) * batch * heads, triton.cdiv(keys, block * _CHUNK)](
            mean, key, last, peaks, keys, heads, groups, layout.key_tiles, begin * each, listed * each,
            *key.stride()[:3], GROUP=fixed["GROUP"], D=dim, PADDED=fixed["PADDED"], CAUSAL=causal,
            PRECISION=fixed["PRECISION"], M=taken, N=block, SIZE=size, CHUNK=_CHUNK, num_warps=_WARPS,
            num_stages=2 if wide else _STAGES,
        )  # fmt: skip
        _lists[(batch * layout.heads * listed,)](
            peaks, last, exponent, first, index, queries, keys, heads, layout.heads, tiles, layout.key_tiles, begin,
            listed, width, rows, layout.query_size, layout.lead, size, count, before, after,
            -(-min(global_tokens, keys) // size), KIND=kind, CAUSAL=causal,
            T=max(16, triton.next_power_of_2(layout.key_tiles)), G=each, STEPS=STEPS, WINDOW=window > 0,
            num_warps=4 if layout.key_tiles * each <= 4096 else 8,
        )  # fmt: skip
    return Tiles(index, size, layout.query_size, checked=True)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "groups", "lead"])
def _means(
    Q, Scale, First, Mean, Last, queries, keys, heads, groups, lead, q_batch, q_head, q_row, D: tl.constexpr,
    PADDED: tl.constexpr, POOL: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Write the mean query of M groups of a head, times the scale, and where the last query of each is; -1 for none."""
    parts = tl.cdiv(groups, M)
    row = (tl.program_id(0) // parts).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.program_id(0) % parts * M
    index = begin * POOL - lead + tl.arange(0, M * POOL)
    position = origin_of(First, batch, queries, keys) + index
    inside = (index >= 0) & (index < queries) & (position >= 0) & (position < keys)
    dim = tl.arange(0, PADDED)
    q = load_rows(Q, batch * q_batch + head * q_head + index.to(tl.int64) * q_row, inside, dim, D).to(tl.float32)
    exists = inside & (tl.max(tl.abs(q), 1) > 0)
    number = tl.sum(tl.reshape(exists.to(tl.float32), [M, POOL]), 1)
    mean = tl.sum(tl.reshape(q, [M, POOL, PADDED]), 1) * (tl.load(Scale + head) / tl.maximum(number, 1.0))[:, None]
    group = begin + tl.arange(0, M)
    place = row * groups + group
    wanted = (group < groups)[:, None] & (dim < D)[None, :]
    tl.store(Mean + place[:, None] * D + dim[None, :], mean.to(Mean.dtype.element_ty), mask=wanted)
    last = tl.max(tl.reshape(tl.where(exists, position, -1), [M, POOL]), 1)
    tl.store(Last + place, last.to(tl.int32), mask=group < groups)


@triton.jit(do_not_specialize=["keys", "heads", "groups", "tiles", "first_group", "listed"])
def _peaks(
    Mean, K, Last, Peaks, keys, heads, groups, tiles, first_group, listed, k_batch, k_head, k_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the largest z of M mean queries, of those that are listed at once, with the keys of each tile of a part.

    Tiles behind the last query of all are left as they are."""
    parts = tl.cdiv(listed, M)
    pairs = tl.num_programs(0) // parts
    row = (tl.program_id(0) % pairs).to(tl.int64)
    batch, head = row // heads, row % heads
    place = (parts - 1 - tl.program_id(0) // pairs) * M + tl.arange(0, M)
    exists = place < listed
    mean = row * groups + first_group + place
    last = tl.load(Last + mean, mask=exists, other=-1)
    end = tl.max(last, 0) + 1 if CAUSAL else tl.where(tl.max(last, 0) >= 0, keys, 0)
    begin, end = tl.program_id(1) * N * CHUNK, tl.minimum(end, (tl.program_id(1) + 1) * N * CHUNK)
    # Up to here every query sees every key of a block. A mean of no queries has any product; nobody reads it.
    clear = tl.minimum(keys, tl.min(tl.where(last >= 0, last, keys), 0) + 1) if CAUSAL else keys
    clear = tl.minimum(end, clear // N * N)
    if begin < end:
        dim, lane, tile = tl.arange(0, PADDED), tl.arange(0, N), tl.arange(0, N // SIZE)
        q = load_rows(Mean, mean * D, exists, dim, D)
        base = K + batch * k_batch + head // GROUP * k_head
        into = Peaks + (row * listed + place)[:, None] * tiles + tile[None, :]
        for start in range(begin, clear, N):
            k = tl.load(
                base + (start + lane).to(tl.int64)[:, None] * k_row + dim[None, :], mask=(dim < D)[None, :], other=0.0
            )
            z = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            peak = tl.max(tl.reshape(z, [M, N // SIZE, SIZE]), 2)
            tl.store(into + start // SIZE, peak, mask=exists[:, None])
        for start in range(tl.maximum(begin, clear), end, N):
            key = start + lane
            k = load_rows(base, key.to(tl.int64) * k_row, key < keys, dim, D)
            z = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            sees = (key < keys)[None, :] & (last >= 0)[:, None]
            if CAUSAL:
                sees &= key[None, :] <= last[:, None]
            z = tl.where(sees, z, float("-inf"))
            peak = tl.max(tl.reshape(z, [M, N // SIZE, SIZE]), 2)
            number = start // SIZE + tile
            tl.store(into + start // SIZE, peak, mask=exists[:, None] & (number < tiles)[None, :])


@triton.jit(do_not_specialize=["queries", "keys", "heads", "lists", "query_tiles", "tiles", "first_tile",
                               "listed", "width", "rows", "query_size", "lead", "size", "count", "before", "after",
                               "always"])  # fmt: skip
def _lists(
    Peaks, Last, Exponent, First, Index, queries, keys, heads, lists, query_tiles, tiles, first_tile, listed, width,
    rows, query_size, lead, size, count, before, after, always, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr, STEPS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Write one list: tiles of the window and the first tokens, and the others by score."""
    job = tl.program_id(0).to(tl.int64)
    number, batch = job // listed % lists, job // (listed * lists)
    query_tile = first_tile + job % listed
    share = heads // lists
    tile, group = tl.arange(0, T), tl.arange(0, G)
    score = tl.full([T], float("-inf"), tl.float32)
    for member in range(0, share):
        head = number * share + member
        row = batch * heads + head
        last = tl.load(Last + (row * query_tiles + query_tile) * G + group)
        there = (tile < tiles)[None, :] & (last >= 0)[:, None]
        if CAUSAL:
            there &= (tile * size)[None, :] <= last[:, None]
        place = ((row * listed + job % listed) * G + group) * tiles
        peak = tl.load(Peaks + place[:, None] + tile[None, :], mask=there, other=float("-inf"))
        exponent = exponent_of(Exponent, head, KIND)
        top = tl.max(peak, 1)
        tau = tl.where(top > float("-inf"), top, 0.0) - 1
        for _ in range(STEPS):
            weight, slope = powers(tl.maximum(peak - tau[:, None], 0.0), exponent, KIND)
            tau += newton_step(tl.sum(weight, 1), tl.sum(slope, 1), exponent, KIND)
        score = tl.maximum(score, tl.max(peak - tau[:, None], 0))
    begin = (origin_of(First, batch, queries, keys) + query_tile * rows - lead) // query_size * query_size
    own = tl.minimum(begin // size, tiles - 1)
    known = (tile == own) | (tile < always)
    if WINDOW:
        known |= (tile >= (begin - before) // size) & (tile <= (begin + query_size - 1 + after) // size)
    reach = tile < tiles
    if CAUSAL:
        reach &= tile <= own
    # Bits that are ordered as the distances to the best score are, from 1 on; 0 for what is listed at all events.
    reach &= known | (score > float("-inf"))
    best = tl.max(tl.where(reach & (score > float("-inf")), score, float("-inf")), 0)
    distance = tl.where(known, 0.0, 1.0 + best - score)
    bits = tl.where(reach, distance, 0.0).to(tl.int32, bitcast=True)
    low, high = tl.full([], 0, tl.int32), tl.max(bits, 0)
    while low < high:  # the least number that at least `count` bits do not exceed, or the greatest of all
        middle = low + (high - low) // 2
        below = tl.sum((reach & (bits <= middle)).to(tl.int32), 0)
        low = tl.where(below < count, middle + 1, tl.where(below == count, middle, low))
        high = tl.where(below < count, high, middle)
    above, level = reach & (bits < low), reach & (bits == low)
    left = count - tl.sum(above.to(tl.int32), 0)
    keep = (above | (level & (tl.cumsum(level.to(tl.int32), 0) <= left))).to(tl.int32)
    slot = tl.cumsum(keep, 0) - keep
    Index += ((batch * lists + number) * query_tiles + query_tile) * width
    tl.store(Index + slot, tile.to(tl.int64), mask=(keep > 0) & (slot < width))
    tl.store(Index + tile, tl.full([T], -1, tl.int64), mask=(tile >= tl.sum(keep, 0)) & (tile < width))
