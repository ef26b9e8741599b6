"""Compute in kernels of `scan` what thresholds change with scores; its docstring says how they fit together."""

import triton
import triton.language as tl


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
