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
def _load_codes(scores, chunk, start, least, keys, C: tl.constexpr):
    """Load the codes of a chunk, and the positions of its keys; those before `least` are no candidates."""
    place = chunk * C + tl.arange(0, C)
    position = place + start
    inside = (position >= 0) & (position < keys)
    score = tl.load(scores + position, mask=inside & (position >= least), other=-float("inf"))
    return _encode(score, place.to(tl.int64)), position, inside


@triton.jit
def count_above(codes, length, limit, EQUAL: tl.constexpr, STEPS: tl.constexpr):
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
    place_a = entry + count_above(b, length_b, code_a, False, STEPS)
    place_b = entry + count_above(a, length_a, code_b, True, STEPS)
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
        tl.store(indices + place_a, tl.where(code_a >= SELECTABLE, place_of(code_a) + start, -1), mask=keep_a)
        tl.store(indices + place_b, tl.where(code_b >= SELECTABLE, place_of(code_b) + start, -1), mask=keep_b)
        tl.store(indices + entry, -1, mask=(rest | (entry >= most)) & (entry < size))
