"""Kernels of `lists`: one launch for every key's interval, and one for what soft gates read in the order of a list."""

import triton
import triton.language as tl


@triton.jit
def _place(Sorted, value, low, high, steps, RIGHT: tl.constexpr):
    """How many of the entries from `low` to `high` of a sorted row stand before each value; with RIGHT, up to it."""
    for _ in range(0, steps):
        middle = (low + high) // 2
        inside = low < high
        entry = tl.load(Sorted + middle, mask=inside, other=0)
        before = inside & ((entry <= value) if RIGHT else (entry < value))
        low = tl.where(before, middle + 1, low)
        high = tl.where(inside & (before == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["keys", "queries", "heads", "window", "sinks", "steps"])
def intervals(
    Rank,
    Floor,
    Scores,
    Tau,
    First,
    Until,
    keys,
    queries,
    heads,
    window,
    sinks,
    steps,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`until` `[B, Hkv, Tk]` of BLOCK keys, in causal order: the first position that does not see the key.

    Floors and thresholds rise, so the queries that select a key are those before a place in a sorted row."""
    row = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = key < keys
    first = tl.load(First + row // heads).to(tl.int32)
    rank = tl.load(Rank + row * keys + key, mask=there, other=0)
    none = tl.zeros([BLOCK], tl.int32)
    end = _place(Floor + row * queries, rank, none, none + queries, steps, True)
    if SOFT:
        score = tl.load(Scores + row * keys + key, mask=there, other=0.0)
        end = _place(Tau + row * queries, score, none, end, steps, False)
    end = tl.where(rank == 0, 0, end + keys - queries)  # rank 0 is no candidate
    end = tl.maximum(end, key + window)
    end = tl.where(key < first + sinks, keys, end)
    tl.store(Until + row * keys + key, tl.where(key < first, 0, end), mask=there)


@triton.jit(do_not_specialize=["size", "keys", "heads", "sinks"])
def in_list_order(Lists, Scores, Until, First, ListScores, Ends, size, keys, heads, sinks, BLOCK: tl.constexpr):
    """Scores, and `until` or 0 for what is no candidate, of BLOCK entries of the lists of a row, `size` in all."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = entry < size
    first = tl.load(First + row // heads).to(tl.int32)
    key = tl.load(Lists + row * size + entry, mask=there, other=-1).to(tl.int32)
    candidate = key >= first + sinks
    score = tl.load(Scores + row * keys + tl.maximum(key, 0), mask=there, other=0.0)
    end = tl.load(Until + row * keys + key, mask=candidate, other=0)
    tl.store(ListScores + row * size + entry, score, mask=there)
    tl.store(Ends + row * size + entry, end, mask=there)
