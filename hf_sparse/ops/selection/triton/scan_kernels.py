"""Scan for thresholds in kernels; the docstring of `scan` says how they fit together.

A key travels as its code, one int64 that holds all there is to know about it:

    code = (score as an ordered integer) << 31  |  (2^31 - 1 - place)

with the place counted from the first chunk. Codes are unique, a higher one is better and of equal scores the lower
index wins, so that sorting, merging and counting need nothing else. Codes below 2^31 are not selectable (score `-inf`,
or no key at all), and 0 fills lists that are not full.
"""

import triton
import triton.language as tl

LOW = tl.constexpr((1 << 31) - 1)
SELECTABLE = tl.constexpr(1 << 31)
HIGHEST = tl.constexpr((1 << 63) - 1)


@triton.jit
def _encode(score, place):
    score = tl.where(score == 0, 0.0, score)  # -0 and 0 tie
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    high = tl.where(score > -float("inf"), ordered.to(tl.int64) + SELECTABLE, 0)
    return (high << 31) + (place ^ LOW)  # LOW - place


@triton.jit
def _score(code):
    ordered = ((code >> 31) - SELECTABLE).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _shifted(code, origin):
    """Return a score less the origin of its row, rounded to float32 as every kernel reads it, in float64."""
    return (_score(code) - origin).to(tl.float64)


@triton.jit
def _place(code):
    return ((code & LOW) ^ LOW).to(tl.int32)


@triton.jit
def first_of(First, batch):
    """Load the first key of a row that is no padding: 0 where `First` `[B]` is `None`."""
    first = batch.to(tl.int32) * 0
    if First is not None:
        first = tl.load(First + batch).to(tl.int32)
    return first


@triton.jit
def counts_of(Counts, row, heads, k, size):
    """Return how many keys the KV head of a row selects and how many it can reach.

    `k` and `size`, or what `Counts` `[2, heads]` has for the head, which are no more."""
    if Counts is not None:
        k = tl.load(Counts + row % heads)
        size = tl.minimum(tl.load(Counts + heads + row % heads), size)
    return k, size


@triton.jit
def _load_codes(scores, chunk, start, least, keys, C: tl.constexpr):
    """Load the codes of a chunk, and the positions of its keys; those before `least` are no candidates."""
    place = chunk * C + tl.arange(0, C)
    position = place + start
    inside = (position >= 0) & (position < keys)
    score = tl.load(scores + position, mask=inside & (position >= least), other=-float("inf"))
    return _encode(score, place.to(tl.int64)), position, inside


@triton.jit
def _count_above(codes, length, limit, EQUAL: tl.constexpr, STEPS: tl.constexpr):
    """Count the codes of a descending list that lie above each limit, or are equal to it if `EQUAL`."""
    found = limit.to(tl.int32) * 0
    for step in range(STEPS):
        probe = found + (1 << (STEPS - 1 - step))
        code = tl.load(codes + probe - 1, mask=probe <= length, other=-1)
        above = (code >= limit) if EQUAL else (code > limit)
        found = tl.where((probe <= length) & above, probe, found)
    return found


@triton.jit(do_not_specialize=["heads", "sinks", "keys", "chunks", "start", "width"])
def sort_chunks(
    scores,
    First,
    rank,
    chunk_lists,
    lists,
    heads,
    sinks,
    keys,
    chunks,
    start,
    width,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Sort every chunk of C keys, and every beginning of R chunks; a key's place is the number of better keys.

    rank `[rows, keys]`, chunk_lists `[rows, chunks, C]`, lists `[rows, chunks, width]`: the best keys of the chunk and
    of those before it in its block of R. Padding and sinks are no candidates.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    scores += row * keys
    least = first_of(First, row // heads) + sinks
    code, position, inside = _load_codes(scores, chunk, start, least, keys, C)
    tl.store(rank + row * keys + position, tl.where(code >= SELECTABLE, code, 0), mask=inside)
    if chunk < chunks:
        first = chunk // R * R
        above = tl.zeros([C], tl.int32)
        for step in range(R):
            other = first + step
            rival, _, _ = _load_codes(scores, other, start, least, keys, C)
            better = tl.sum((rival[:, None] > code[None, :]).to(tl.int32), 0)
            above += better
            if other == chunk:
                tl.store(chunk_lists + (row * chunks + chunk) * C + better, code)
            if other >= chunk:
                tl.store(lists + (row * chunks + other) * width + above, code, mask=above < width)


@triton.jit
def _merge(a, length_a, b, length_b, entry, width, STEPS: tl.constexpr):
    """Find the places of both lists' codes at `entry` in the merged list of `width`; the masks drop the rest."""
    in_a, in_b = entry < length_a, entry < length_b
    code_a = tl.load(a + entry, mask=in_a, other=0)
    code_b = tl.load(b + entry, mask=in_b, other=0)
    place_a = entry + _count_above(b, length_b, code_a, False, STEPS)
    place_b = entry + _count_above(a, length_a, code_b, True, STEPS)
    return code_a, place_a, in_a & (place_a < width), code_b, place_b, in_b & (place_b < width)


@triton.jit(do_not_specialize=["source_row", "source_width", "target_width", "reach", "heads"])
def merge_earlier(
    source,
    target,
    Counts,
    source_row,
    source_list,
    source_width,
    target_width,
    reach,
    heads,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Run one round of a prefix scan: merge list i with list `i - reach`, if that exists.

    Entries beyond the keys that a head can reach are neither read nor written."""
    number, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    out = target + (row * tl.num_programs(0) + number) * target_width
    _, source_width = counts_of(Counts, row, heads, source_width, source_width)
    _, target_width = counts_of(Counts, row, heads, target_width, target_width)
    a = source + row * source_row + number.to(tl.int64) * source_list
    earlier = tl.where(number >= reach, source_width, 0)
    b = a - tl.where(number >= reach, reach, 0).to(tl.int64) * source_list
    code_a, place_a, keep_a, code_b, place_b, keep_b = _merge(a, source_width, b, earlier, entry, target_width, STEPS)
    tl.store(out + place_a, code_a, mask=keep_a)
    tl.store(out + place_b, code_b, mask=keep_b)
    tl.store(out + entry, 0, mask=(entry >= source_width + earlier) & (entry < target_width))


@triton.jit(do_not_specialize=["blocks", "block_width", "chunks", "width", "before", "start", "every", "size", "heads"])
def merge_for_tiles(
    block_lists,
    lists,
    target,
    index,
    Counts,
    blocks,
    block_width,
    chunks,
    width,
    before,
    start,
    every,
    size,
    heads,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    WITH_INDEX: tl.constexpr,
):
    """Merge the best `size` keys before each chunk: of the blocks before its block, and of the chunks in between.

    target `[rows, tiles, size]`; index `[rows, tiles / every, size]` int32, positions, -1 for none. Where a head can
    reach fewer keys, the rest of its targets is not written.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    entry = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    chunk = before + tile
    block, step = chunk // R, chunk % R
    a = block_lists + (row * blocks + tl.maximum(block - 1, 0)) * block_width
    b = lists + (row * chunks + tl.maximum(chunk - 1, 0)) * width
    _, block_width = counts_of(Counts, row, heads, block_width, block_width)
    _, most = counts_of(Counts, row, heads, size, size)
    length_a = tl.where(block > 0, block_width, 0)
    length_b = tl.where(step > 0, tl.minimum(tl.minimum(step * C, width), most), 0)
    out = target + (row * tiles + tile) * size
    code_a, place_a, keep_a, code_b, place_b, keep_b = _merge(a, length_a, b, length_b, entry, most, STEPS)
    rest = entry >= length_a + length_b
    tl.store(out + place_a, code_a, mask=keep_a)
    tl.store(out + place_b, code_b, mask=keep_b)
    tl.store(out + entry, 0, mask=rest & (entry < most))
    if WITH_INDEX and tile % every == 0:
        indices = index + (row * tl.cdiv(tiles, every) + tile // every) * size
        tl.store(indices + place_a, tl.where(code_a >= SELECTABLE, _place(code_a) + start, -1), mask=keep_a)
        tl.store(indices + place_b, tl.where(code_b >= SELECTABLE, _place(code_b) + start, -1), mask=keep_b)
        tl.store(indices + entry, -1, mask=(rest | (entry >= most)) & (entry < size))


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
    tl.store(Origin + row, tl.where(lowest >= SELECTABLE, _score(lowest), 0.0))


@triton.jit(do_not_specialize=["size", "heads"])
def sum_lists(codes, Counts, Origin, sums, size, heads, SIZE: tl.constexpr):
    """Sum the scores of every list up to each entry, in float64: tau is a small difference of these sums."""
    row = tl.program_id(1).to(tl.int64)
    base = (row * tl.num_programs(0) + tl.program_id(0)) * size
    _, size = counts_of(Counts, row, heads, size, size)
    entry = tl.arange(0, SIZE)
    code = tl.load(codes + base + entry, mask=entry < size, other=0)
    score = tl.where(code >= SELECTABLE, _shifted(code, origin_of(Origin, row)), 0.0)
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
        at_w = _shifted(tl.load(codes + next_w - 1, mask=next_w <= most_w, other=0), origin)
        at_u = _shifted(tl.load(codes + next_u - 1, mask=next_u <= most_u, other=0), origin)
        w = tl.where((next_w <= most_w) & (at_w > limit), next_w, w)
        u = tl.where((next_u <= most_u) & (at_u - 1 > limit), next_u, u)
    inside = tl.load(sums + w - 1, mask=w > 0, other=0.0) - tl.load(sums + u - 1, mask=u > 0, other=0.0)
    lowest = _shifted(tl.load(codes + u - 1, mask=u > 0, other=0), origin)
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
    codes,
    sums,
    origin,
    active,
    low,
    high,
    k,
    least_w,
    most_w,
    least_u,
    most_u,
    bits,
    member,
    score,
    NEW: tl.constexpr,
):
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
    length = _count_above(codes, size, tl.zeros([Q], tl.int64) + SELECTABLE, True, STEPS)
    active = there & (length > k)
    best = _shifted(tl.load(codes + k - 1, mask=active, other=0), origin)
    high = tl.where(active, best, 0.0)
    root = _solve(
        codes, sums, origin, active, high - 1, high, k, none, length, none, length, k * 0 + STEPS, none, none, False
    )
    tl.store(bounds + at, tl.where(length > k, root, -float("inf")), mask=there)


@triton.jit(do_not_specialize=["queries", "chunks", "before", "size", "k", "heads"])
def query_thresholds(
    codes,
    sums,
    chunk_lists,
    Counts,
    Origin,
    bounds,
    floor,
    tau,
    queries,
    chunks,
    before,
    size,
    k,
    heads,
    C: tl.constexpr,
    Q: tl.constexpr,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    WITH_TAU: tl.constexpr,
):
    """Compute the floor and tau of Q queries of one tile at once.

    Query q of the tile sees the list of the tile and the first q keys of the chunk. Its best keys are the first ones
    of the list and some of the chunk; which ones follows from how many stand before each in the union of both.
    """
    tile, row = tl.program_id(0) // (C // Q), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0) // (C // Q)
    query = tl.program_id(0) % (C // Q) * Q + tl.arange(0, Q)
    codes += (row * tiles + tile) * size
    if WITH_TAU:
        sums += (row * tiles + tile) * size
    k, size = counts_of(Counts, row, heads, k, size)
    chunk_lists += (row * chunks + before + tile) * C
    number = tl.arange(0, C)
    code = tl.load(chunk_lists + number)
    arrival = _place(code) - (before + tile) * C
    arrived = arrival[None, :] < query[:, None]
    # Count the keys that have arrived up to each, in the order of the chunk's list; a matrix product sums fastest.
    up_to = (number[:, None] <= number[None, :]).to(tl.float16)
    ahead = tl.dot(arrived.to(tl.float16), up_to).to(tl.int32)
    place = _count_above(codes, size, code, False, STEPS)[None, :] + ahead  # from 1

    kept = arrived & (place <= size)
    length = size - tl.sum(kept.to(tl.int32), 1)
    worst = tl.max(tl.where(kept, number[None, :], -1), 1)
    last = tl.load(codes + length - 1, mask=length > 0, other=HIGHEST)
    last = tl.minimum(last, tl.load(chunk_lists + worst, mask=worst >= 0, other=HIGHEST))
    at = tile * C + query
    tl.store(floor + row * queries + at, tl.where(last >= SELECTABLE, last, 0), mask=at < queries)

    if WITH_TAU:
        entry = tl.arange(0, SIZE)
        listed = tl.load(codes + entry, mask=entry < size, other=0)
        selectable = listed >= SELECTABLE
        length = tl.minimum(length, tl.sum(selectable.to(tl.int32), 0))
        member = kept & (code >= SELECTABLE)[None, :]
        origin = origin_of(Origin, row)
        score = tl.where(code >= SELECTABLE, _shifted(code, origin), 0.0)
        active = length + tl.sum(member.to(tl.int32), 1) > k

        # The k-th best score: f is at least k one below it, and less than k at it.
        top = arrived & (place <= k)
        rest = k - tl.sum(top.to(tl.int32), 1)
        best = _shifted(tl.load(codes + rest - 1, mask=active & (rest > 0), other=0), origin)
        worst = tl.max(tl.where(top, number[None, :], -1), 1)
        other = _shifted(tl.load(chunk_lists + worst, mask=worst >= 0, other=0), origin)
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
        z = tl.where(selectable, _shifted(listed, origin), -float("inf"))
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


@triton.jit
def count_before(Sorted, value, low, high, steps, RIGHT: tl.constexpr):
    """Count the entries from `low` to `high` of a sorted row before each value, or up to it with RIGHT."""
    for _ in range(0, steps):
        middle = (low + high) // 2
        inside = low < high
        entry = tl.load(Sorted + middle, mask=inside, other=0)
        before = inside & ((entry <= value) if RIGHT else (entry < value))
        low = tl.where(before, middle + 1, low)
        high = tl.where(inside & (before == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["keys", "queries", "arrival", "steps"])
def free_intervals(Scores, Rank, Floor, Tau, Begin, End, Change, keys, queries, arrival, steps, BLOCK: tl.constexpr):
    """Find the queries from `Begin` to `End` `[rows, keys]` int32 at which a key's gate is between 0 and 1.

    `Change` `[rows, queries + 1]` int32, of zeros, gets 1 at the beginning and -1 at the end of each interval. Key j is
    eligible from query `j + arrival` on."""
    row = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = key < keys
    at = row * keys + key
    score = tl.load(Scores + at, mask=there, other=0.0)
    rank = tl.load(Rank + at, mask=there, other=0)
    none = tl.zeros([BLOCK], tl.int32)
    begin = count_before(Tau + row * queries, score - 1.0, none, none + queries, steps, True)  # a gate of 1 before
    begin = tl.minimum(tl.maximum(begin, key + arrival), queries)
    end = count_before(Floor + row * queries, rank, none, none + queries, steps, True)
    end = count_before(Tau + row * queries, score, none, end, steps, False)
    end = tl.where(rank > 0, tl.maximum(end, begin), begin)
    tl.store(Begin + at, begin, mask=there)
    tl.store(End + at, end, mask=there)
    some = there & (end > begin)
    Change += row * (queries + 1)
    tl.atomic_add(Change + begin, none + 1, mask=some, sem="relaxed")
    tl.atomic_add(Change + end, none - 1, mask=some, sem="relaxed")


@triton.jit(do_not_specialize=["queries"])
def shares(Grad, Change, Share, Total, queries, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Divide the gradient of BLOCK queries by the number of free keys of each, 0 without one, and sum that up.

    `Grad` `[rows, queries, GROUP]` is summed over the group. `Share` `[rows, queries]` gets the sums from the first of
    the BLOCK queries on, `Total` `[rows, blocks]` the sum of all of them.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK)
    query = block * BLOCK + index
    there = query < queries
    Change += row * (queries + 1)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, block * BLOCK, BLOCK):
        before += tl.load(Change + start + index)
    free = tl.sum(before, 0) + tl.cumsum(tl.load(Change + query, mask=there, other=0), 0)
    grad = tl.zeros([BLOCK], tl.float32)
    for member in range(GROUP):
        grad += tl.load(Grad + (row * queries + query) * GROUP + member, mask=there, other=0.0)
    share = tl.where(free > 0, grad / tl.maximum(free, 1).to(tl.float32), 0.0)
    tl.store(Share + row * queries + query, tl.cumsum(share, 0), mask=there)
    tl.store(Total + row * tl.num_programs(0) + block, tl.sum(share, 0))


@triton.jit(do_not_specialize=["blocks"])
def sum_totals(Total, Before, blocks, MANY: tl.constexpr):
    """Sum `Total` `[rows, blocks]` up to each block: `Before` `[rows, blocks + 1]`, 0 first."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, MANY)
    sum_before = tl.full([], 0.0, tl.float32)
    tl.store(Before + row * (blocks + 1), sum_before)
    for start in range(0, blocks, MANY):
        block = start + index
        total = tl.load(Total + row * blocks + block, mask=block < blocks, other=0.0)
        tl.store(Before + row * (blocks + 1) + block + 1, sum_before + tl.cumsum(total, 0), mask=block < blocks)
        sum_before += tl.sum(total, 0)


@triton.jit(do_not_specialize=["keys", "queries", "blocks"])
def sum_shares(Share, Before, Begin, End, DScores, keys, queries, blocks, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the shares over every key's interval, from the sums of `shares` and `sum_totals`; ADD adds to what is there.

    Sums are those from the beginning of a block on; the first query of a block has none before it."""
    row = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = key < keys
    begin = tl.load(Begin + row * keys + key, mask=there, other=0)
    end = tl.load(End + row * keys + key, mask=there, other=0)
    Share += row * queries - 1
    Before += row * (blocks + 1)
    d_score = tl.load(Before + end // BLOCK, mask=there, other=0.0)
    d_score -= tl.load(Before + begin // BLOCK, mask=there, other=0.0)
    d_score += tl.load(Share + end, mask=there & (end % BLOCK > 0), other=0.0)
    d_score -= tl.load(Share + begin, mask=there & (begin % BLOCK > 0), other=0.0)
    to = DScores + row * keys + key
    if ADD:
        d_score += tl.load(to, mask=there, other=0.0)
    tl.store(to, d_score, mask=there)
