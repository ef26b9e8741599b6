"""Walk over the keys of a block of queries as two axes of slots; the kernels from queries to keys share it.

A program owns `M` rows, a row being one query of one of the query heads that share a KV head: row r of that KV head is
query `r // GROUP` of head `r % GROUP`. So a whole group shares what is gathered, whatever its size. The program reads
first the slots that all of its rows attend to with gate 1, a whole number of blocks of keys without any mask, and then
the others, each pair of query and key by its interval (see `lists`):

    full     the front of the list, and the middle of the window, each a whole number of blocks
    mixed    the rest of the list, the leavers of its tile so far, and the two ends of the window

Hard gates in causal order read the window in one go instead, and mask the blocks at its ends, where a pair takes a
comparison or two; their mixed axis is the rest of the list and the leavers. Soft gates make the rest of a list long,
and a causal list holds no key of any window: these go by themselves, with no other mask than their gate, and what that
needs is read in the order of the list.
"""

import triton
import triton.language as tl

from hf_sparse.ops.selection.triton.scan_kernels import first_of


@triton.jit
def rows_of(block, queries, GROUP: tl.constexpr, M: tl.constexpr):
    """Return each row's number, query, head in the group and existence, and the block's first and last query."""
    row = block * M + tl.arange(0, M)
    query = row // GROUP
    first = block * M // GROUP
    last = tl.minimum((block * M + M - 1) // GROUP, queries - 1)
    return row, query, row % GROUP, query < queries, first, last


@triton.jit
def listed(slot, limit, Lists, first, sinks, width, keys):
    """Load the keys of the slots below `limit` of a list, sinks in front; -1 for none."""
    inside = (slot >= sinks) & (slot < tl.minimum(limit, sinks + width))
    key = tl.load(Lists + slot - sinks, mask=inside, other=-1).to(tl.int32)
    own = tl.minimum(tl.minimum(sinks, limit), keys - first)  # sinks that the row has
    return tl.where(slot < own, first + slot, key)


@triton.jit
def listed_gates(slot, limit, Scores, Ends, sinks, width, position, tau):
    """Compute the gates `[M, N]` and scores `[N]` of the slots below `limit` of a causal list, without its sinks.

    A gate is 0 where the query does not attend to the key.

    And their scores `[N]`."""
    inside = (slot >= sinks) & (slot < sinks + width) & (slot < limit)
    until = tl.load(Ends + slot - sinks, mask=inside, other=0)
    z = tl.load(Scores + slot - sinks, mask=inside, other=0.0)
    gate = tl.minimum(tl.maximum(z[None, :] - tau, 0.0), 1.0)
    return tl.where(until[None, :] > position, gate, 0.0), z


@triton.jit
def front_keys(start, Lists, first, sinks, N: tl.constexpr):
    """Load the keys of N slots from `start` on, where a list has a key in each, sinks in front."""
    step = tl.arange(0, N)
    slot = start + step
    return tl.load(Lists + (start - sinks) + step, mask=slot >= sinks, other=first + slot)


@triton.jit
def begins(key, there, Begin, CAUSAL: tl.constexpr):
    """Load the first position that sees each key."""
    return key if CAUSAL else tl.load(Begin + key, mask=there, other=0)


@triton.jit
def survey(
    Z, Begin, Until, Lists, Scores, Ends, first, low, high, tau, sinks, width, keys,
    SOFT: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the slots that every position from `low` to `high` attends to, and those that any of them does.

    Returns how many slots in front of the list every position attends to with gate 1, and how many slots from the
    front on hold all keys that any of them attends to; `tau` is the threshold of `high`, the highest."""
    full = sinks + width
    live = 0
    for start in range(0, sinks + width, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        if SOFT and CAUSAL:
            sink = slot < sinks
            inside = (slot >= sinks) & (slot < sinks + width)
            until = tl.load(Ends + slot - sinks, mask=inside, other=0)
            until = tl.where(sink & (first + slot < keys), keys, until)
            begin = tl.where(sink, first + slot, 0)
            z = tl.load(Scores + slot - sinks, mask=inside, other=float("inf"))
            there = until > 0
        else:
            key = listed(slot, sinks + width, Lists, first, sinks, width, keys)
            there = key >= 0
            begin = begins(key, there, Begin, CAUSAL)
            until = tl.load(Until + key, mask=there, other=0)
            if SOFT:
                z = tl.load(Z + key, mask=there, other=0.0)
        everywhere = there & (begin <= low) & (until > high)
        if SOFT:
            everywhere = everywhere & (z - tau >= 1.0) & (z - 1.0 >= tau)
        anywhere = there & (begin <= high) & (until > low)
        full = tl.minimum(full, tl.min(tl.where(everywhere, 1 << 30, slot), 0))
        live = tl.maximum(live, tl.max(tl.where(anywhere, slot + 1, 0), 0))
    return full, live


@triton.jit
def look_up(Bounds, t_first, t_last, tile, first, low, high, sinks, keys):
    """Load what `survey` and `left_before` count, of hard gates in causal order, from the `Bounds` of a tile.

    They say nothing of queries of the next tile: a block that goes on there has nothing but sinks in front."""
    own = tl.minimum(sinks, keys - first)  # sinks that the row has
    full = tl.minimum(tl.maximum(low - first + 1, 0), own)
    live = tl.minimum(tl.maximum(high - first + 1, 0), own)
    begin = t_first % tile
    end = begin + t_last - t_first
    full = tl.where(full == sinks, sinks + tl.load(Bounds + end, mask=end < tile, other=0), full)
    listed_first = tl.load(Bounds + begin)
    live = tl.where(listed_first > 0, sinks + listed_first, live)
    return full, live, tl.load(Bounds + tile + begin)


@triton.jit
def left_before(Leavers, tile, low, left, TILE: tl.constexpr):
    """Count the leavers of a tile that stand before the window of position `low`."""
    entry = tl.arange(0, TILE)
    key = tl.load(Leavers + entry, mask=entry < tile, other=-1)
    return tl.sum(((key >= 0) & (key < low - left)).to(tl.int32), 0)


@triton.jit
def window_of(low, high, first, left, right, sinks, keys, CAUSAL: tl.constexpr):
    """Bound the keys around positions `low` to `high`.

    Returns the first key and, among the keys, the first and the end of those that all positions see with gate 1; then
    the end of all."""
    begin = tl.maximum(low - left, first + sinks)
    end = tl.minimum(high + right + 1, keys)
    begin = tl.minimum(begin, end)
    if CAUSAL:
        full_begin = tl.minimum(tl.maximum(high - left, begin), end)
        full_end = tl.maximum(tl.minimum(low + right + 1, end), full_begin)
    else:  # a key here may be in the list as well, and must be looked at
        full_begin = end
        full_end = end
    return begin, full_begin, full_end, end


@triton.jit
def reach(
    row, batch, query, exists, t_first, t_last, Z, Tau, Begin, Until, Lists, Leavers, Bounds, Scores, Ends, First,
    queries, keys, width, tiles, tile, left, right, sinks,
    SOFT: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load what a block of rows has to know of its KV head `row`.

    Returns the tables of that head and of the tile; positions and thresholds `[M, 1]`; its first key; and the bounds of
    both axes, see `survey`, `left_before` and `window_of`; those of the lists from `Bounds` unless that is `None`."""
    offset = keys - queries
    low, high = t_first + offset, t_last + offset
    first = first_of(First, batch)
    Until += row * keys
    if Bounds is not None:
        tile = TILE  # a power of two then, which takes no division
    number = row * tiles + t_first // tile
    Lists += number * width
    tau, tau_last = 0.0, 0.0
    if not CAUSAL:
        Begin += row * keys
    if SOFT:
        Z += row * keys
    if SOFT and CAUSAL:
        tau = tl.load(Tau + row * queries + query, mask=exists, other=0.0)[:, None]
        tau_last = tl.load(Tau + row * queries + t_last)
        Scores += number * width
        Ends += number * width
    if CAUSAL:
        Leavers += number * tile
    if Bounds is not None:
        front, live, gone = look_up(Bounds + number * 2 * tile, t_first, t_last, tile, first, low, high, sinks, keys)
    else:
        front, live = survey(
            Z, Begin, Until, Lists, Scores, Ends, first, low, high, tau_last, sinks, width, keys, SOFT, CAUSAL, 512
        )
        gone = 0
        if CAUSAL:
            gone = left_before(Leavers, tile, low, left, TILE)
    begin, full_begin, full_end, end = window_of(low, high, first, left, right, sinks, keys, CAUSAL)
    # A tuple holds no None: `Until` takes the place of tables that no kernel reads.
    z = Z if SOFT else Until
    scores, ends = (Scores, Ends) if SOFT and CAUSAL else (Until, Until)
    start, leavers = (Until, Leavers) if CAUSAL else (Begin, Until)
    tables = (z, start, Until, Lists, leavers, scores, ends)
    return tables, (query + offset)[:, None], tau, first, front, live, gone, begin, full_begin, full_end, end


@triton.jit
def mixed(
    slot, position, front, live, gone, begin, left_end, right_begin, end, Begin, Until, Lists, Leavers, first, sinks,
    width, keys,
    ALWAYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Load the keys of slots of the mixed axis, -1 for none, and which positions see them; `gone` are leavers."""
    rest = live - front
    around = slot + (begin - rest - gone)
    around = tl.where(around < left_end, around, around + (right_begin - left_end))
    around = tl.where(around < end, around, -1)
    if CAUSAL:
        leaver = (slot >= rest) & (slot < rest + gone)
        around = tl.where(leaver, tl.load(Leavers + slot - rest, mask=leaver, other=-1), around)
    key = tl.where(slot < rest, listed(front + slot, live, Lists, first, sinks, width, keys), around)
    since = begins(key, key >= 0, Begin, CAUSAL)
    if not CAUSAL:
        key = tl.where((slot >= rest) & (since == ALWAYS), -1, key)
    until = tl.load(Until + key, mask=key >= 0, other=0)
    return key, (since[None, :] <= position) & (until[None, :] > position)


@triton.jit
def hide_ends(logits, at, position, full_begin, low, end, Until, N: tl.constexpr):
    """Set the logits `[M, N]` of keys from `at` on in the window to `-inf` where a position does not see the key.

    Keys before `full_begin` are seen until a position of their own, those after `low`, the lowest position, from their
    own on, and those between by all."""
    step = tl.arange(0, N)
    if (at < full_begin) | (at + N - 1 > low):  # one branch around both: otherwise the second costs every block
        if at < full_begin:
            until = tl.load((Until + at) + step, mask=at + step < end, other=0)
            logits = tl.where(until[None, :] > position, logits, float("-inf"))
        if at + N - 1 > low:
            logits = tl.where((at + step)[None, :] <= position, logits, float("-inf"))
    return logits


@triton.jit
def rest_and_leavers(slot, position, front, live, gone, Until, Lists, Leavers, first, sinks, width, keys):
    """Load the keys of slots of a list after `front`, then of its `gone` leavers, -1 for none.

    And which positions see them, `[M, N]`."""
    rest = live - front
    key = listed(front + slot, live, Lists, first, sinks, width, keys)
    leaver = (slot >= rest) & (slot < rest + gone)
    key = tl.load(Leavers + (slot - rest), mask=leaver, other=key)
    until = tl.load(Until + key, mask=key >= 0, other=0)
    # The maximum of one number: the compiler moves it to the threads that compare, where it would otherwise repeat all
    # of these loads for each of the columns of a thread.
    until = tl.max(until[:, None], 1)
    since = tl.where(front + slot < sinks, first + front + slot, 0)
    return key, (since[None, :] <= position) & (until[None, :] > position)


@triton.jit
def gates(position, tau, key, z, left, right):
    """Compute the gates `[M, N]` of attended pairs: 1 in the window, `clip(z - tau, 0, 1)` outside."""
    near = (key >= position - left) & (key <= position + right)
    return tl.where(near, 1.0, tl.minimum(tl.maximum(z - tau, 0.0), 1.0)), near


@triton.jit
def _load_rows(pointer, there, D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Load rows `[N, PADDED]`, zeros beyond `D` and, with MASKED, of those that are not there."""
    dim = tl.arange(0, PADDED)
    if MASKED and PADDED != D:
        rows = tl.load(pointer, mask=there[:, None] & (dim < D)[None, :], other=0.0)
    elif MASKED:
        rows = tl.load(pointer, mask=there[:, None], other=0.0)
    elif PADDED != D:
        rows = tl.load(pointer, mask=(dim < D)[None, :], other=0.0)
    else:
        rows = tl.load(pointer)
    return rows


@triton.jit
def gather(
    Base, key, there, stride, D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr = True
):
    """Gather rows `[N, PADDED]` of a `[Tk, D]` tensor, zeros beyond `D` and, with MASKED, for keys that are missing.

    Without WIDE the offset of a row fits into 32 bits, which takes fewer instructions."""
    dim = tl.arange(0, PADDED)
    if WIDE:
        pointer = Base + key.to(tl.int64)[:, None] * stride + dim[None, :]
    else:
        pointer = (Base + dim[None, :]) + (key * stride)[:, None]
    return _load_rows(pointer, there, D, PADDED, MASKED)


@triton.jit
def consecutive(Base, first, stride, end, N: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Load rows `[N, PADDED]` of a `[Tk, D]` tensor from `first` on.

    Zeros beyond `D` and, with MASKED, from `end` on."""
    dim = tl.arange(0, PADDED)
    row = tl.arange(0, N)
    pointer = Base + first.to(tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    there = row < end - first
    return _load_rows(pointer, there, D, PADDED, MASKED)
