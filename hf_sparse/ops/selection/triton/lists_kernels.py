"""Find intervals of keys, leavers, and the values that soft gates read in list order; one launch each."""

import triton
import triton.language as tl

from hf_sparse.ops.selection.triton.scan_kernels import first_of
from hf_sparse.ops.selection.triton.threshold_gradients import count_before
from hf_sparse.ops.selection.triton.threshold_kernels import origin_of


@triton.jit(do_not_specialize=["keys", "queries", "heads", "window", "sinks", "steps"])
def intervals(
    Rank, Floor, Scores, Origin, Tau, First, Until, Shifted, keys, queries, heads, window, sinks, steps,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find `until` `[B, Hkv, Tk]` of BLOCK keys in causal order: the first position that does not see the key.

    Floors and thresholds rise, so the queries that select a key are those before a place in a sorted row. With SOFT
    also write `Shifted` `[B, Hkv, Tk]`: scores less the origin of their row, and infinity for sinks and padding, whose
    gate is 1 whatever tau is."""
    row = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = key < keys
    first = first_of(First, row // heads)
    rank = tl.load(Rank + row * keys + key, mask=there, other=0)
    none = tl.zeros([BLOCK], tl.int32)
    end = count_before(Floor + row * queries, rank, none, none + queries, steps, True)
    if SOFT:
        score = tl.load(Scores + row * keys + key, mask=there, other=0.0) - origin_of(Origin, row)
        tl.store(Shifted + row * keys + key, tl.where(key < first + sinks, float("inf"), score), mask=there)
        end = count_before(Tau + row * queries, score, none, end, steps, False)
    end = tl.where(rank == 0, 0, end + keys - queries)  # rank 0 is no candidate
    end = tl.maximum(end, key + window)
    end = tl.where(key < first + sinks, keys, end)
    tl.store(Until + row * keys + key, tl.where(key < first, 0, end), mask=there)


@triton.jit(do_not_specialize=["size", "keys"])
def in_list_order(Lists, Scores, Until, ListScores, Ends, size, keys, BLOCK: tl.constexpr):
    """Gather the scores, and `until` or 0 for no key, of BLOCK of the `size` entries of a row's lists."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = entry < size
    key = tl.load(Lists + row * size + entry, mask=there, other=-1)
    score = tl.load(Scores + row * keys + tl.maximum(key, 0), mask=there, other=0.0)
    end = tl.load(Until + row * keys + key, mask=key >= 0, other=0)
    tl.store(ListScores + row * size + entry, score, mask=there)
    tl.store(Ends + row * size + entry, end, mask=there)


@triton.jit(do_not_specialize=["keys", "queries", "heads", "tiles", "tile", "left", "sinks"])
def leaving(Until, First, Leavers, keys, queries, heads, tiles, tile, left, sinks, TILE: tl.constexpr):
    """Find the leavers of one tile, a row of `Leavers` `[B, Hkv, n_tiles, tile]`; `lists.leavers` defines them."""
    number, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = first_of(First, row // heads)
    index = tl.arange(0, TILE)
    key = number * tile + keys - queries - left + index
    there = (index < tile - 1) & (key >= first + sinks) & (key < keys)
    until = tl.load(Until + row * keys + key, mask=there, other=0)
    stays = there & (until > key + left + 1)
    place = tl.where(stays, tl.cumsum(stays.to(tl.int32), 0), tl.cumsum((stays == 0).to(tl.int32), 0)) - 1
    place += tl.where(stays, 0, tl.sum(stays.to(tl.int32), 0))  # those that stay first, every place once
    tl.store(Leavers + (row * tiles + number) * tile + place, tl.where(stays, key, -1), mask=place < tile)
