"""Find until when each key stays in the best `size`, from the lists of `scan_kernels`; one launch, or that of the join.

While keys arrive one by one, each that beats the last of the list enters, and the lowest of all that were ever in the
list leaves. So of the keys of a list and those that enter during a tile, in rising order, the i-th leaves when the i-th
newcomer enters.
"""

import triton
import triton.language as tl

from hf_sparse.ops.selection.triton.scan_kernels import (
    HIGHEST,
    SELECTABLE,
    count_above,
    counts_of,
    join_groups,
    place_of,
    steps_for,
)


@triton.jit(do_not_specialize=["keys", "queries", "chunks", "before", "window", "size", "heads"])
def evictions(
    all_chunks,
    all_lowest,
    all_lists,
    Counts,
    Notes,
    Until,
    Leavers,
    Bounds,
    keys,
    queries,
    chunks,
    before,
    window,
    size,
    heads,
    C: tl.constexpr,
    PART: tl.constexpr,
):
    """Write to `Until` `[rows, keys]` when the keys leave that do so during one tile of C queries.

    Newcomer i of the tile is eligible from its query i + 1 on. A newcomer that does not enter leaves at once, which is
    `key + window`; whatever stays is left as it is in `Until`. `Leavers` `[rows, tiles, C]` gets the newcomers that
    enter and are seen by a later query of the tile, in rising order, -1 after the last. `Bounds` `[rows, tiles, 2, C]`
    gets, for each query of the tile, how many keys of the list it sees, which are the first ones, and how many of these
    newcomers stand before its window. Both may be `None`.

    Args:
        all_chunks: `[rows, chunks, C]` sorted; newcomers of tile i are those of chunk `before + i`.
        all_lowest: `[rows, tiles, C]`, the last C of the `size` best keys before each tile, best first; if `size` is
            less than C, in the last `size` columns.
        all_lists: `[rows, tiles, size]`, the positions of these keys, -1 for none; read for `Bounds` only.
        Notes: `[rows, tiles, 3, C]` int32, for what entries of one order tell those of another.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = row * tl.num_programs(0) + tile
    number = tl.arange(0, C)
    lists = all_lists + at * size
    _, size = counts_of(Counts, row, heads, size, size)
    chunk = all_chunks + (row * chunks + before + tile) * C
    origin = (before + tile) * C  # place of the first newcomer
    position = tile * C + keys - queries - window + 1  # its position, which may be negative
    Until += row * keys
    code = tl.load(chunk + number)
    arrival = place_of(code) - origin
    candidate = code >= SELECTABLE
    last = tl.load(all_lowest + at * C + C - 1)
    many = tl.sum((candidate & (code > last)).to(tl.int32), 0)  # the first ones; nothing else can enter
    enters, shown_ones = number < 0, many * 0
    entered_before, dropped = number * 0, number * 0  # before each query; of the list
    if many > 0:
        steps = steps_for(many)
        entered, total, leaves = Notes + at * 3 * C, Notes + (at * 3 + 1) * C, Notes + (at * 3 + 2) * C
        # Each enters if fewer better ones came before it than there are worse keys in the list. No more than `many`
        # keys leave, so that only the last `near` of the list matter.
        near = tl.minimum(tl.minimum(size, C), many)
        lowest = all_lowest + at * C + C - near
        worse = near - count_above(lowest, near, code, False, steps)
        ahead = tl.zeros([C], tl.int32)
        for part in range(0, many, PART):
            other = part + tl.arange(0, PART)
            earlier = place_of(tl.load(chunk + other)) - origin
            ahead += tl.sum(
                ((earlier[:, None] < arrival[None, :]) & (other[:, None] < number[None, :])).to(tl.int32), 0
            )
        enters = (number < many) & (ahead < worse)
        entering = tl.sum(enters.to(tl.int32), 0)
        so_far = tl.cumsum(enters.to(tl.int32), 0)
        tl.store(entered + arrival, enters.to(tl.int32))
        tl.store(total + number, so_far)
        tl.debug_barrier()  # both are written
        # Places in rising order of what was in the list and what enters.
        listed = number < near
        old = tl.load(lowest + near - 1 - number, mask=listed, other=HIGHEST)
        better = count_above(chunk, many, old, False, steps)
        better = tl.load(total + better - 1, mask=listed & (better > 0), other=0)
        place = number + entering - better
        old_position = tl.where(old >= SELECTABLE, place_of(old) - origin + position, -1)
        tl.store(leaves + place, old_position, mask=listed & (place < entering))
        place = worse + entering - so_far
        tl.store(leaves + place, arrival + position, mask=enters & (place < entering))
        enters_now = tl.load(entered + number) > 0  # in the order of arrival
        count = tl.cumsum(enters_now.to(tl.int32), 0)
        tl.debug_barrier()  # those that leave are written
        left = tl.load(leaves + count - 1, mask=enters_now, other=-1)
        query = tile * C + number + 1  # the first that sees the newcomer
        tl.store(Until + left, query + keys - queries, mask=(left >= 0) & (query < queries))
        if Leavers is not None:
            shown = enters_now & (query < queries) & (number < C - 1)
            tl.store(Leavers + at * C + count - 1, number + position, mask=shown)
            shown_ones = tl.sum(shown.to(tl.int32), 0)
            of_list = ((left >= 0) & (left < position)).to(tl.int32)
            entered_before, dropped = count - enters_now.to(tl.int32), tl.cumsum(of_list, 0) - of_list
    tl.store(Until + arrival + position, arrival + position + window, mask=candidate & (enters == 0))
    if Leavers is not None:
        tl.store(Leavers + at * C + number, number * 0 - 1, mask=number >= shown_ones)
        listed_ones = size
        if last < SELECTABLE:  # the list is not full
            listed_ones = size * 0
            for start in range(0, size, C):
                key = tl.load(lists + start + number, mask=start + number < size, other=-1)
                listed_ones += tl.sum((key >= 0).to(tl.int32), 0)
        tl.store(Bounds + at * 2 * C + number, listed_ones - dropped)
        tl.store(Bounds + (at * 2 + 1) * C + number, entered_before)


@triton.jit(
    do_not_specialize=[
        "group", "narrow", "totals", "total_width", "lists", "width", "start", "every", "keys", "queries", "chunks",
        "window", "size", "heads",
    ]
)  # fmt: skip
def join_and_evict(
    all_totals,
    all_lists,
    Lowest,
    Index,
    Counts,
    all_chunks,
    Notes,
    Until,
    Leavers,
    Bounds,
    group,
    narrow,
    totals,
    total_width,
    lists,
    width,
    start,
    every,
    keys,
    queries,
    chunks,
    window,
    size,
    heads,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    EVICTED: tl.constexpr,
):
    """Run `join_groups` and `evictions` for one tile, whose list is that of a program: `size` is at most BLOCK.

    No key may come before the first newcomer, so that no list tells of keys that another tile evicts. EVICTED is `PART`
    of `evictions`; other arguments are as there and in `join_groups`."""
    join_groups(
        all_totals, all_lists, None, Lowest, Index, None, Counts, 0, group, narrow, totals, total_width, lists, width,
        start, every, keys, size, heads, C, BLOCK, PART, WIDTH, STEPS,
    )  # fmt: skip
    tl.debug_barrier()  # the list is written
    evictions(
        all_chunks, Lowest, Index, Counts, Notes, Until, Leavers, Bounds, keys, queries, chunks, 0, window, size, heads,
        C, EVICTED,
    )  # fmt: skip
