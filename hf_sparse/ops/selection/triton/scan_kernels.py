"""Sort keys by their scores, and merge sorted lists, in kernels of `scan`, whose docstring says how they fit together.

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
def score_of(code):
    ordered = ((code >> 31) - SELECTABLE).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def shifted(code, origin):
    """Return a score less the origin of its row, rounded to float32 as every kernel reads it, in float64."""
    return (score_of(code) - origin).to(tl.float64)


@triton.jit
def place_of(code):
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
def count_above(codes, length, limit, EQUAL: tl.constexpr, steps):
    """Count the codes of a descending list that lie above each limit, or are equal to it if `EQUAL`.

    At most `2^steps - 1` of them."""
    found = limit.to(tl.int32) * 0
    for step in range(steps):
        probe = found + (1 << (steps - 1 - step))
        code = tl.load(codes + probe - 1, mask=probe <= length, other=-1)
        above = (code >= limit) if EQUAL else (code > limit)
        found = tl.where((probe <= length) & above, probe, found)
    return found


@triton.jit
def count_above_by_four(codes, length, limit, rounds):
    """Count as `count_above`, at most `4^rounds - 1`, in half as many rounds, each of which waits for three loads."""
    found = limit.to(tl.int32) * 0
    for number in range(rounds):
        part = 1 << (2 * (rounds - 1 - number))
        above = limit.to(tl.int32) * 0
        for quarter in tl.static_range(1, 4):
            probe = found + quarter * part
            above += (tl.load(codes + probe - 1, mask=probe <= length, other=-1) > limit).to(tl.int32)
        found += part * above
    return found


@triton.jit
def steps_for(length):
    """Return the steps in which `count_above` searches a list."""
    steps = length * 0
    while (1 << steps) <= length:
        steps += 1
    return steps


@triton.jit(do_not_specialize=["heads", "sinks", "keys", "queries", "chunks", "start", "window"])
def sort_chunks(
    scores,
    First,
    Rank,
    Until,
    chunk_lists,
    heads,
    sinks,
    keys,
    queries,
    chunks,
    start,
    window,
    C: tl.constexpr,
):
    """Sort every chunk of C keys; a key's place is the number of better keys. Padding and sinks are no candidates.

    chunk_lists `[rows, chunks, C]`. `Rank` `[rows, keys]` int64 gets the codes, 0 for no candidate. `Until`
    `[rows, keys]` int32 gets the first position that does not see the key, as if of the candidates all that become
    eligible after the first query stayed, and no other were selected; `join_groups` and `evictions` overwrite the rest.
    Each may be `None`.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    scores += row * keys
    first = first_of(First, row // heads)
    place = chunk * C + tl.arange(0, C)
    position = place + start
    inside = (position >= 0) & (position < keys)
    score = tl.load(scores + position, mask=inside & (position >= first + sinks), other=-float("inf"))
    code = _encode(score, place.to(tl.int64))
    if Rank is not None:
        tl.store(Rank + row * keys + position, tl.where(code >= SELECTABLE, code, 0), mask=inside)
    if Until is not None:
        end = tl.where(position + window <= keys - queries, keys - queries, keys)
        end = tl.maximum(tl.where(code >= SELECTABLE, end, 0), position + window)
        end = tl.where(position < first + sinks, keys, end)
        tl.store(Until + row * keys + position, tl.where(position < first, 0, end), mask=inside)
    if chunk < chunks:
        # Where all scores differ they are enough: to compare and count in float32 takes half of the instructions.
        above = tl.sum(tl.where(score[:, None] > score[None, :], 1.0, 0.0), 0).to(tl.int32)
        if tl.sum(above, 0) < C * (C - 1) // 2:
            above = tl.sum((code[:, None] > code[None, :]).to(tl.int32), 0)
        tl.store(chunk_lists + (row * chunks + chunk) * C + above, code)


@triton.jit(do_not_specialize=["source_row", "source_list", "width", "target_width", "lists", "group", "heads"])
def merge_groups(
    source,
    target,
    Counts,
    source_row,
    source_list,
    width,
    target_width,
    lists,
    group,
    heads,
    BLOCK: tl.constexpr,
    MANY: tl.constexpr,
    STEPS: tl.constexpr,
    BY_FOUR: tl.constexpr,
):
    """Merge each of the `lists` with all before it in its group of `group`, into the best `target_width`.

    A program places BLOCK entries of one list in the merged lists that have them, its own and later ones of the group:
    a place is the number of better keys in the lists merged, which are counted MANY lists at a time. Lists are `width`
    long, or what a head can reach; beyond that, and beyond all keys of a group so far, nothing is read or written.
    """
    number, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    _, target_most = counts_of(Counts, row, heads, target_width, target_width)
    length = tl.minimum(width, target_most)
    source += row * source_row
    target += row * lists * target_width
    code = tl.load(source + number.to(tl.int64) * source_list + entry, mask=entry < length, other=0)
    codes = tl.broadcast_to(code[:, None], [BLOCK, MANY])
    place = tl.where(entry < length, 0, target_most)
    other = number // group * group
    end = tl.minimum(other + group, lists)
    while (other < end) & (tl.min(place, 0) < target_most):
        members = other + tl.arange(0, MANY)
        there = members < end
        begin = source + tl.where(there, members, 0).to(tl.int64) * source_list
        lengths = tl.where(there, length, 0)[None, :]
        if BY_FOUR:
            better = count_above_by_four(begin[None, :], lengths, codes, (STEPS + 1) // 2)
        else:
            better = count_above(begin[None, :], lengths, codes, False, STEPS)
        places = place[:, None] + tl.cumsum(better, 1)
        kept = (there & (members >= number))[None, :] & (places < target_most)
        tl.store(target + members.to(tl.int64)[None, :] * target_width + places, codes, mask=kept)
        place += tl.sum(better, 1)
        other += MANY


@triton.jit
def _put(
    code, place, kept, size, start, keys, Codes, Lowest, Index, Until, listed, initial, C: tl.constexpr
):  # fmt: skip
    """Store codes at their places in a list of `size`, in each of the forms of `join_groups` that is wanted."""
    candidate = code >= SELECTABLE
    position = place_of(code) + start
    if Codes is not None:
        tl.store(Codes + place, code, mask=kept)
    if Lowest is not None:
        tl.store(Lowest + place + C - size, code, mask=kept & (place >= size - C))
    if Index is not None:
        tl.store(Index + place, tl.where(candidate, position, -1), mask=kept & listed)
    if Until is not None:
        tl.store(Until + position, place * 0 + keys, mask=kept & initial & candidate)


@triton.jit(
    do_not_specialize=[
        "before", "group", "narrow", "totals", "total_width", "lists", "width", "start", "every", "keys", "size",
        "heads",
    ]
)  # fmt: skip
def join_groups(
    all_totals,
    all_lists,
    Codes,
    Lowest,
    Index,
    Until,
    Counts,
    before,
    group,
    narrow,
    totals,
    total_width,
    lists,
    width,
    start,
    every,
    keys,
    size,
    heads,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Merge lists of `merge_groups` with those of all groups before theirs, into the best `size` keys.

    Program i of n takes list `i + before - 1` of `all_lists` `[rows, lists, width]`, merged of lists of `narrow` keys,
    and the one for its groups before in `all_totals` `[rows, totals, total_width]`; none if that number is -1. It
    writes what is not `None` of `Codes` `[rows, n, size]`; `Lowest` `[rows, n, C]`, the last C of these; `Index`
    `[rows, n / every, size]` int32, of every i that `every` divides, positions, -1 for none; and `Until` `[rows, keys]`
    int32, `keys` for each key of the first list. Where a head can reach fewer keys, they are the best that it reaches;
    the rest of `Codes`, and of `Lowest` what lies before the beginning of a list, is not written.
    """
    item, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    items = tl.num_programs(0)
    number = tl.maximum(item + before - 1, 0)
    earlier = number // group  # groups
    _, most = counts_of(Counts, row, heads, size, size)
    a = all_totals + (row * totals + tl.maximum(earlier - 1, 0)) * total_width
    b = all_lists + (row * lists + number) * width
    length_a = tl.minimum(earlier * width, most)
    length_b = tl.minimum(tl.minimum((number % group + 1) * narrow, width), most)
    length_b = tl.where(item + before > 0, length_b, 0)
    # If the list of earlier groups is full, keys that are worse than its last one do not matter: most of them.
    last = tl.load(a + length_a - 1, mask=length_a == most, other=-1)
    wide = tl.arange(0, WIDTH)
    enter = tl.sum((tl.load(b + wide, mask=wide < length_b, other=-1) > last).to(tl.int32), 0)

    if Codes is not None:
        Codes += (row * items + item) * size
    if Lowest is not None:
        Lowest += (row * items + item) * C
    if Index is not None:
        Index += (row * (items // every) + item // every) * size
    if Until is not None:
        Until += row * keys
    listed, initial = item % every == 0, item == 0
    begin = tl.program_id(2) * BLOCK
    entry = begin + tl.arange(0, BLOCK)
    code = tl.load(a + entry, mask=entry < length_a, other=0)
    place = entry + count_above(b, enter, code, False, steps_for(enter))
    kept = (entry < length_a) & (place < most)
    _put(code, place, kept, most, start, keys, Codes, Lowest, Index, Until, listed, initial, C)
    for part in range(begin, tl.minimum(enter, begin + BLOCK), PART):
        of_part = part + tl.arange(0, PART)
        there = of_part < enter
        code_b = tl.load(b + of_part, mask=there, other=0)
        place_b = of_part + count_above(a, length_a, code_b, False, STEPS)
        kept_b = there & (place_b < most)
        _put(code_b, place_b, kept_b, most, start, keys, Codes, Lowest, Index, Until, listed, initial, C)
    # The rest: no key in the list, none that the head can reach in the index.
    rest = entry >= length_a + enter
    none, empty = tl.zeros([BLOCK], tl.int64), rest & (entry < most)
    _put(none, entry, empty, most, start, keys, Codes, Lowest, None, None, listed, initial, C)
    if Index is not None:
        tl.store(Index + entry, entry * 0 - 1, mask=listed & (rest | (entry >= most)) & (entry < size))
