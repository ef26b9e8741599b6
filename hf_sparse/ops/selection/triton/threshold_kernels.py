"""Solve for thresholds in kernels of `scan`, from sorted lists of the codes that `scan_kernels` defines."""

import triton
import triton.language as tl

from hf_sparse.ops.selection.triton.scan_kernels import (
    HIGHEST,
    SELECTABLE,
    count_above,
    counts_of,
    place_of,
    score_of,
    shifted,
)


@triton.jit
def origin_of(Origin, row):
    """Load what is subtracted from the scores of a row: 0 where `Origin` `[rows]` is `None`."""
    origin = row.to(tl.float32) * 0.0
    if Origin is not None:
        origin = tl.load(Origin + row)
    return origin


@triton.jit(do_not_specialize=["tiles", "chunks", "size", "k", "heads"])
def find_origins(
    codes, chunk_lists, Counts, Origin, tiles, chunks, size, k, heads, C: tl.constexpr, SIZE: tl.constexpr
):
    """Choose a score near the thresholds of a row, `[rows]`: next to a large score float32 would round tau.

    The k-th best key before the last tile, or the last one there is; without one the best key of the last chunk."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, SIZE)
    codes += (row * tiles + tiles - 1) * size
    k, size = counts_of(Counts, row, heads, k, size)
    code = tl.load(codes + entry, mask=(entry < size) & (entry < k), other=0)
    newest = tl.load(chunk_lists + (row * chunks + chunks - 1) * C)
    lowest = tl.min(tl.where(code >= SELECTABLE, code, HIGHEST), 0)
    lowest = tl.where(lowest == HIGHEST, newest, lowest)
    tl.store(Origin + row, tl.where(lowest >= SELECTABLE, score_of(lowest), 0.0))


@triton.jit(do_not_specialize=["size", "heads"])
def sum_lists(codes, Counts, Origin, sums, size, heads, SIZE: tl.constexpr):
    """Sum the scores of every list up to each entry, in float64: tau is a small difference of these sums."""
    row = tl.program_id(1).to(tl.int64)
    base = (row * tl.num_programs(0) + tl.program_id(0)) * size
    _, size = counts_of(Counts, row, heads, size, size)
    entry = tl.arange(0, SIZE)
    code = tl.load(codes + base + entry, mask=entry < size, other=0)
    score = tl.where(code >= SELECTABLE, shifted(code, origin_of(Origin, row)), 0.0)
    tl.store(sums + base + entry, tl.cumsum(score, 0), mask=entry < size)


@triton.jit
def _mass(codes, sums, origin, limit, least_w, most_w, least_u, most_u, bits, member, score, NEW: tl.constexpr):
    """Count free and saturated keys at a threshold, per query; sum the free scores, find the lowest saturated one.

    Of the list, w keys are above the threshold and u of them are saturated; both are looked for between two counts that
    are less than `2^bits` apart. `NEW` adds the members `[Q, C]` of the chunk.
    """
    w, u = least_w, least_u
    while bits > 0:
        bits -= 1
        next_w, next_u = w + (1 << bits), u + (1 << bits)
        at_w = shifted(tl.load(codes + next_w - 1, mask=next_w <= most_w, other=0), origin)
        at_u = shifted(tl.load(codes + next_u - 1, mask=next_u <= most_u, other=0), origin)
        w = tl.where((next_w <= most_w) & (at_w > limit), next_w, w)
        u = tl.where((next_u <= most_u) & (at_u - 1 > limit), next_u, u)
    inside = tl.load(sums + w - 1, mask=w > 0, other=0.0) - tl.load(sums + u - 1, mask=u > 0, other=0.0)
    lowest = shifted(tl.load(codes + u - 1, mask=u > 0, other=0), origin)
    lowest = tl.where(u > 0, lowest, float("inf"))
    free, full = w - u, u
    if NEW:
        saturated = member & (score[None, :] - 1 > limit[:, None])
        between = member & (score[None, :] > limit[:, None]) & ~saturated
        inside += tl.sum(tl.where(between, score[None, :], 0.0), 1)
        lowest = tl.minimum(lowest, tl.min(tl.where(saturated, score[None, :], float("inf")), 1))
        free += tl.sum(between.to(tl.int32), 1)
        full += tl.sum(saturated.to(tl.int32), 1)
    return free, full, inside, lowest


@triton.jit
def _solve(
    codes, sums, origin, active, low, high, k, least_w, most_w, least_u, most_u, bits, member, score,
    NEW: tl.constexpr,
):  # fmt: skip
    """Solve for thresholds between `low` and `high`, float64, of the active queries; the others get `low`.

    f is piecewise linear: the root of the line through a point is exact as soon as the point lies on the right piece.
    Every third step halves the interval, so that it gets there. A last look beyond the root: where f stays at k for a
    while, the threshold is the end of that, and the root was its beginning.
    """
    limit, root = low, low
    beyond = active & False
    wanted = k.to(tl.float64)
    count = 0
    while (count < 120) & (tl.max(active.to(tl.int32), 0) > 0):
        free, full, inside, lowest = _mass(
            codes, sums, origin, limit, least_w, most_w, least_u, most_u, bits, member, score, NEW
        )
        line = (inside + full - wanted) / tl.maximum(free, 1).to(tl.float64)
        flat = (free == 0) & (full == k)
        done = active & (flat | beyond)
        root = tl.where(active, tl.where(flat, lowest - 1, tl.where(beyond, root, low)), root)
        active = active & ~done
        exact = active & (free > 0) & (tl.abs(line - limit) <= 1e-14 * (1 + tl.abs(limit)))
        root = tl.where(exact, line, root)
        reached = inside - free * limit + full >= wanted * (1 - 1e-12)
        low = tl.where(reached, limit, low)
        high = tl.where(reached, high, limit)
        usable = (free > 0) & (line >= low) & (line <= high) & (count % 3 != 2)
        limit = tl.where(usable, line, (low + high) / 2)
        limit = tl.where(exact, root + 4e-12 * wanted * (1 + tl.abs(root)), limit)
        beyond = exact
        count += 1
    return root


@triton.jit(do_not_specialize=["tiles", "size", "k", "heads"])
def tile_thresholds(codes, sums, Counts, Origin, bounds, tiles, size, k, heads, Q: tl.constexpr, STEPS: tl.constexpr):
    """Solve for the threshold of every list, `[rows, tiles]` float64, `-inf` for at most k keys; Q lists a program.

    Those before and after a tile enclose the thresholds of its queries.
    """
    tile = tl.program_id(0) * Q + tl.arange(0, Q)
    there = tile < tiles
    row = tl.program_id(1).to(tl.int64)
    origin = origin_of(Origin, row)
    at = row * tiles + tile
    codes += tl.where(there, at, 0) * size
    sums += tl.where(there, at, 0) * size
    k, size = counts_of(Counts, row, heads, k, size)
    none = tl.zeros([Q], tl.int32)
    length = count_above(codes, size, tl.zeros([Q], tl.int64) + SELECTABLE, True, STEPS)
    active = there & (length > k)
    best = shifted(tl.load(codes + k - 1, mask=active, other=0), origin)
    high = tl.where(active, best, 0.0)
    root = _solve(
        codes, sums, origin, active, high - 1, high, k, none, length, none, length, k * 0 + STEPS, none, none, False
    )
    tl.store(bounds + at, tl.where(length > k, root, -float("inf")), mask=there)


@triton.jit(do_not_specialize=["queries", "chunks", "before", "size", "k", "heads"])
def query_thresholds(
    codes, sums, chunk_lists, Counts, Origin, bounds, floor, tau, queries, chunks, before, size, k, heads,
    C: tl.constexpr, Q: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Compute the floor and tau of Q queries of one tile at once.

    Query q of the tile sees the list of the tile and the first q keys of the chunk. Its best keys are the first ones
    of the list and some of the chunk; which ones follows from how many stand before each in the union of both.
    """
    tile, row = tl.program_id(0) // (C // Q), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0) // (C // Q)
    query = tl.program_id(0) % (C // Q) * Q + tl.arange(0, Q)
    codes += (row * tiles + tile) * size
    sums += (row * tiles + tile) * size
    k, size = counts_of(Counts, row, heads, k, size)
    chunk_lists += (row * chunks + before + tile) * C
    number = tl.arange(0, C)
    code = tl.load(chunk_lists + number)
    arrival = place_of(code) - (before + tile) * C
    arrived = arrival[None, :] < query[:, None]
    # Count the keys that have arrived up to each, in the order of the chunk's list; a matrix product sums fastest.
    up_to = (number[:, None] <= number[None, :]).to(tl.float16)
    ahead = tl.dot(arrived.to(tl.float16), up_to).to(tl.int32)
    place = count_above(codes, size, code, False, STEPS)[None, :] + ahead  # from 1

    kept = arrived & (place <= size)
    length = size - tl.sum(kept.to(tl.int32), 1)
    worst = tl.max(tl.where(kept, number[None, :], -1), 1)
    last = tl.load(codes + length - 1, mask=length > 0, other=HIGHEST)
    last = tl.minimum(last, tl.load(chunk_lists + worst, mask=worst >= 0, other=HIGHEST))
    at = tile * C + query
    tl.store(floor + row * queries + at, tl.where(last >= SELECTABLE, last, 0), mask=at < queries)

    entry = tl.arange(0, SIZE)
    listed = tl.load(codes + entry, mask=entry < size, other=0)
    selectable = listed >= SELECTABLE
    length = tl.minimum(length, tl.sum(selectable.to(tl.int32), 0))
    member = kept & (code >= SELECTABLE)[None, :]
    origin = origin_of(Origin, row)
    score = tl.where(code >= SELECTABLE, shifted(code, origin), 0.0)
    active = length + tl.sum(member.to(tl.int32), 1) > k

    # The k-th best score: f is at least k one below it, and less than k at it.
    top = arrived & (place <= k)
    rest = k - tl.sum(top.to(tl.int32), 1)
    best = shifted(tl.load(codes + rest - 1, mask=active & (rest > 0), other=0), origin)
    worst = tl.max(tl.where(top, number[None, :], -1), 1)
    other = shifted(tl.load(chunk_lists + worst, mask=worst >= 0, other=0), origin)
    best = tl.minimum(tl.where(rest > 0, best, float("inf")), tl.where(worst >= 0, other, float("inf")))
    high = tl.where(active, best, 0.0)
    low = high - 1
    # The thresholds before and after the tile bound more closely, but for rounding.
    since = tl.load(bounds + row * tiles + tile)
    until = tl.load(bounds + row * tiles + tile + 1, mask=tile + 1 < tiles, other=float("inf"))
    low = tl.where(active, tl.maximum(low, since - 1e-12 * (1 + tl.abs(since))), low)
    high = tl.where(active, tl.minimum(high, until + 1e-12 * (1 + tl.abs(until))), high)
    # Between these, few keys of the list change sides.
    lowest = tl.min(tl.where(active, low, float("inf")), 0)
    highest = tl.max(tl.where(active, high, -float("inf")), 0)
    highest += 1e-11 * k * (1 + tl.abs(highest))
    z = tl.where(selectable, shifted(listed, origin), -float("inf"))
    least_w = tl.sum((z > highest).to(tl.int32), 0)
    least_u = tl.sum((z - 1 > highest).to(tl.int32), 0)
    most_w = tl.sum((z > lowest).to(tl.int32), 0)
    most_u = tl.sum((z - 1 > lowest).to(tl.int32), 0)
    bits = k * 0
    while (1 << bits) <= tl.maximum(most_w - least_w, most_u - least_u):
        bits += 1
    root = _solve(
        codes,
        sums,
        origin,
        active,
        low,
        high,
        k,
        tl.minimum(least_w, length),
        tl.minimum(most_w, length),
        tl.minimum(least_u, length),
        tl.minimum(most_u, length),
        bits,
        member,
        score,
        True,
    )
    value = tl.where(length + tl.sum(member.to(tl.int32), 1) > k, root, -float("inf")).to(tl.float32)
    value = tl.max(tl.where(query[None, :] <= query[:, None], value[None, :], -float("inf")), 1)
    tl.store(tau + row * (tl.num_programs(0) * Q) + at, value)


@triton.jit(do_not_specialize=["queries"])
def raise_thresholds(Raw, Tau, queries, Q: tl.constexpr):
    """Copy Q thresholds `[rows, queries]`, none below those of earlier programs of `query_thresholds`.

    `Raw` `[rows, n * Q]` rises within each Q; rounding could make it fall from one Q to the next."""
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query = piece * Q + tl.arange(0, Q)
    Raw += row * tl.num_programs(0) * Q
    value = tl.load(Raw + query)
    for start in range(0, piece, 512):
        earlier = start + tl.arange(0, 512)
        last = tl.load(Raw + earlier * Q + (Q - 1), mask=earlier < piece, other=-float("inf"))
        value = tl.maximum(value, tl.max(last, 0))
    tl.store(Tau + row * queries + query, value, mask=query < queries)
