"""Find the keys that may have weight: a lower bound of tau for every row, then one sweep of the products.

tau over some keys is never above tau over all. `_start` takes it over the first keys of the text, those next to the
query and, in long texts, some from between, all held in registers: of every `PROBE`th key those with the largest
products, one for each place in the registers. `_sweep` compares every product with that bound, which rises on the way:
the largest product of every four parts of a block of keys is one more key, and a step of Newton's method over these,
from a point where their mass is at least 1, is a lower bound too. What passes is kept for `GROUP_ROWS` consecutive
queries of a head together, as bits: `N` consecutive keys are a block of four words. Where the buffer takes all blocks,
each has its place there. Otherwise, of the blocks of a group only those with a bit are stored, with their number. A
group with more of these than its buffer takes says so in its count, and goes to the kernel that needs no candidates.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import (
    Lists,
    Numbers,
    constants,
    exponent_of,
    is_slim,
    load_rows,
    newton_step,
    ones_of,
    origin_of,
    powers,
    scale_of,
)
from hf_sparse.ops.triton.early import early, take_over
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty
from hf_sparse.ops.triton.sizes import pieces


class Blocks(NamedTuple):
    """Hold the sizes of a program: rows, keys at a time, Triton's warps and stages, the most registers of a thread."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


class Candidates(NamedTuple):
    """Hold what passed the lower bound.

    bound: `[B, Hq, Tq]` float32, `inf` where there is no query, `-inf` for a query of which nothing is known.
    words: `[groups, capacity, 4]` int32, see `key_of_bit`.
    blocks: `[groups, capacity]` int32, number of the block; its first key is that times `size`. None where that is its
        place among all keys or listed tiles.
    counts: `[groups]` int32, blocks that are stored; above `capacity` some are missing.
    size: keys of a block.
    totals: `[groups]` int32, candidates of each group; where some are missing, more than `few` and `HEAVY`.
    queue: `[2, groups]` int32, the groups with more than `few` candidates: in the first row those with more than
        `kept`. Of the others, those with more than `HEAVY` stand at the front of the second row, the rest at its back.
    turn: `[TURNS]` int32: 0, for the number of groups of the second row that programs of `groups` have taken; how many
        stand at its front and at its back, and how many in the first row; 0, for the number of these that are taken.
    kept: candidates of a group that every buffer takes.
    """

    bound: Tensor
    words: Tensor
    blocks: Tensor | None
    counts: Tensor
    size: int
    totals: Tensor
    queue: Tensor
    turn: Tensor
    kept: int


LENGTHS = [
    "queries", "keys", "heads", "capacity", "width", "lists", "query_tiles", "rows", "lead", "size",
]  # fmt: skip
TURNS = 8  # numbers that programs count with
HEAVY = 256  # candidates of a group above which it comes before those with fewer
GROUP_ROWS = 16  # queries that share a list of candidates: the rows of a matrix product
FIRST = 64  # keys of the beginning over which the lower bound is taken
NEAR = 128  # keys around the rows of a program, likewise
SHORT = 4096  # keys of a text up to which programs of half the rows, of which there are twice as many, take less time
FAR = 16384  # keys of a text up to which the first and the near ones say enough of the others
PROBE = 16  # in longer texts one in so many of the keys between these is looked at for the bound, too
HIGHER = 0.06  # how far above the first bound a step of Newton's method begins as well
EVERY = 4  # blocks of keys after which the bound rises
STEEP = tl.constexpr(2.0**60)  # what makes a difference of float32 numbers, one of them at least 2 ** -35, at least 1


def is_far(query: Tensor, key: Tensor, lists: Lists | None) -> bool:
    """Tell whether all keys of a long text are attended to, with heads for which sizes of their own were measured."""
    return lists is None and is_slim(query) and FAR < key.shape[2] <= 2 * FAR


def start_blocks(query: Tensor, key: Tensor, lists: Lists | None) -> Blocks:
    """Return the sizes of the kernel of the lower bound."""
    if query.shape[3] <= 128:
        return Blocks(64, 2 * NEAR if is_far(query, key, lists) else NEAR, 4, 1)
    return Blocks(32 if query.dtype == torch.float32 else 64, NEAR, 8, 1)


def start_steps(query: Tensor) -> int:
    """Return how many steps of Newton's method the first bound takes: each gives a higher one."""
    return 3 if is_slim(query) else 5


def probe_of(key: Tensor) -> int:
    """Return how far apart the keys are that the first bound looks at between the first and the near ones; 0 for none.

    In a long text these say little of what is far away."""
    return PROBE if key.shape[2] > FAR else 0


def sweep_blocks(query: Tensor, key: Tensor, lists: Lists | None) -> Blocks:
    """Return the sizes of the kernel that compares all products."""
    if query.dtype == torch.float32:
        return Blocks(64, 64, 4, 2) if query.shape[3] <= 128 else Blocks(32, 64, 8, 1)
    if query.shape[3] <= 64:
        if is_far(query, key, lists):  # three programs share a multiprocessor, where two of twice the rows would
            return Blocks(64, 128, 4, 3, 168)
        return Blocks(64 if key.shape[2] <= SHORT else 128, 128, 4, 3)
    return Blocks(128, 128, 8, 3) if query.shape[3] <= 128 else Blocks(128, 64, 8, 2)


def blocks_of(query: Tensor, key: Tensor, lists: Lists | None, blocks: Blocks | None = None) -> tuple[Blocks, int]:
    """Return the sizes of the sweep, by default those that suit the query, and the most blocks of a group."""
    blocks = blocks or sweep_blocks(query, key, lists)
    if lists is None:
        return blocks, pieces(key.shape[2], blocks.keys)
    blocks = blocks._replace(rows=min(blocks.rows, lists.rows), keys=min(blocks.keys, lists.size))
    return blocks, lists.index.shape[3] * lists.size // blocks.keys


def candidates(
    query: Tensor,
    key: Tensor,
    numbers: Numbers,
    first: Tensor | None,
    valid: Tensor | None,
    packed: Tensor | None,
    causal: bool,
    capacity: int,
    few: int,
    kept: int,
    blocks: Blocks | None = None,
    start: Blocks | None = None,
    near: int = FIRST,
    every: int = EVERY,
    lists: Lists | None = None,
    probe: int | None = None,
) -> Candidates:
    """Return the keys of every group of queries that the lower bounds do not exclude.

    Args:
        query, key: `[B, Hq, Tq, D]` and `[B, Hkv, Tk, D]`, the last dimension contiguous.
        numbers: what makes z of the products.
        first: `[B]` int32, position of the first query; None where the queries are the last positions.
        valid: `[B, Tk]` uint8, 0 for padding.
        packed: `packed_bits(valid, size)` with the keys of a block of `blocks_of`; None where `valid` is.
        causal: whether a query sees the keys up to its position only.
        capacity: the most blocks that are kept for a group.
        few, kept: candidates of a group for which there are a kernel without buffers, and a place in every buffer.
        blocks, start: sizes of the programs.
        near: keys of the beginning over which the bound is taken.
        every: blocks of keys after which the bound rises.
        lists: tiles of keys, for which `takes_lists` is true; all keys by default.
        probe: see `probe_of`, whose choice is the default; lists have none.
    """
    batch, heads, queries, _ = query.shape
    keys, device = key.shape[2], query.device
    start, probe = start or start_blocks(query, key, lists), probe_of(key) if probe is None else probe
    blocks, most = blocks_of(query, key, lists, blocks)
    groups, length = batch * heads * pieces(queries, GROUP_ROWS), queries
    listed: tuple[Any, ...] = (None, None, 0, 0, 0, 1, 1, queries, 0, 1)
    if lists is not None:
        number, tiles = lists.index.shape[1:3]
        start = start._replace(rows=min(start.rows, lists.rows))
        length = tiles * lists.rows  # the tiles of queries are whole
        groups = batch * heads * length // GROUP_ROWS
        strides = lists.index.stride()[:3]
        listed = (lists.index, lists.counts, *strides, number, tiles, lists.rows, lists.lead, lists.size)
    capacity = min(capacity, most)
    bound = empty((batch, heads, queries), torch.float32, device)
    sums = empty((4, batch, heads, queries), torch.float32, device)
    turn = empty((TURNS,), torch.int32, device)
    fixed = constants(query, key, numbers.kind, causal)
    strides = (*query.stride()[:3], *key.stride()[:3])
    grid = (pieces(length, start.rows) * batch * heads,)
    launch(_start, grid)(
        query, key, *numbers.arguments, first, valid, bound, sums, turn, *listed, queries, keys, heads, *strides,
        **fixed, M=start.rows, NEAR=start.keys, FIRST=near, STEPS=start_steps(query), HIGHER=HIGHER, TURNS=TURNS,
        PROBE=probe if lists is None else 0, **early(),
        num_warps=start.warps, num_stages=start.stages, maxnreg=start.registers,
    )  # fmt: skip
    words = empty((groups, capacity, 4), torch.int32, device)
    places = None if capacity == most else empty((groups, capacity), torch.int32, device)
    counts, totals = empty((groups,), torch.int32, device), empty((groups,), torch.int32, device)
    queue = empty((2, groups), torch.int32, device)
    width = 0 if packed is None else packed.shape[1]
    grid = (pieces(length, blocks.rows) * batch * heads,)
    launch(_sweep, grid)(
        query, key, *numbers.arguments, first, packed, bound, sums, words, places, counts, totals, turn, queue, groups,
        kept, *listed, queries, keys, heads, capacity, width, *strides, **fixed, FEW=few, MANY=max(HEAVY, few), W=128,
        M=blocks.rows, N=blocks.keys, R=GROUP_ROWS, START=start.rows,
        NEAR=start.keys, FIRST=near, HIGHER=HIGHER, EVERY=every, **early(), num_warps=blocks.warps,
        num_stages=blocks.stages, maxnreg=blocks.registers,
    )  # fmt: skip
    return Candidates(bound, words, places, counts, blocks.keys, totals, queue, turn, kept)


def packed_bits(valid: Tensor, size: int) -> Tensor:
    """Return `[B, T]` as words `[B, blocks * 4]` int32, see `key_of_bit`."""
    whole = torch.nn.functional.pad(valid, (0, -valid.shape[1] % size)).view(len(valid), -1, size // 8, 4, 2)
    bits = whole.transpose(2, 3).flatten(3).long()
    return (bits << torch.arange(size // 4, device=valid.device)).sum(-1).flatten(1).to(torch.int32)


@triton.jit
def key_of_bit(block, word, bit, N: tl.constexpr):
    """Return the key that a bit stands for: word w of a block has the keys 2 w and 2 w + 1 of every 8.

    These are the columns of a matrix product that one thread holds, so that it makes its word without asking others."""
    return block * N + bit // 2 * 8 + word * 2 + bit % 2


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=LENGTHS)
def _start(
    Q, K, Scale, factor, Exponent, First, Valid, Bound, Sums, Turn,
    Index, Listed, i_batch, i_list, i_tile, lists, query_tiles, rows, lead, size, queries, keys, heads,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, NEAR: tl.constexpr, FIRST: tl.constexpr, STEPS: tl.constexpr,
    HIGHER: tl.constexpr, TURNS: tl.constexpr, PROBE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Find the `Bound` of M rows: tau over FIRST first keys, NEAR keys around the rows and FIRST others, or less.

    It is `inf` where there is no query, and `-inf` for a query that sees none of these keys."""
    take_over(EARLY)
    if tl.program_id(0) == 0:
        tl.store(Turn + tl.arange(0, TURNS), tl.zeros([TURNS], tl.int32))
    tiles = tl.cdiv(queries, M) if Index is None else query_tiles * (rows // M)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # of [B, Hq]
    batch, head = row // heads, row % heads
    begin = tl.program_id(0) % tiles * M - lead
    index = begin + tl.arange(0, M)
    origin = origin_of(First, batch, queries, keys)
    position = origin + index
    inside = (index >= 0) & (index < queries)
    exists = inside & (position < keys) & (position >= 0)
    if Valid is not None:
        exists &= tl.load(Valid + batch * keys + position, mask=exists, other=0) != 0
    scale, exponent = scale_of(Scale, factor, head), exponent_of(Exponent, head, KIND)
    dim = tl.arange(0, PADDED)
    q = load_rows(Q + batch * q_batch + head * q_head, index.to(tl.int64) * q_row, exists, dim, D)
    K += batch * k_batch + head // GROUP * k_head

    lowest = origin + begin  # position of the first row
    begin = lowest + M - NEAR if CAUSAL else lowest + M // 2 - NEAR // 2
    begin = tl.maximum(tl.minimum(begin, keys - NEAR), 0)
    early, near = tl.arange(0, FIRST), begin + tl.arange(0, NEAR)
    see_early, see_near = early < keys, (near < keys) & (near >= FIRST)
    if Index is not None:
        tile = tl.program_id(0) % tiles * M // rows
        job = (batch * lists + head // (heads // lists)) * query_tiles + tile
        Index += batch * i_batch + head // (heads // lists) * i_list + tile * i_tile
        count = tl.load(Listed + job)
        see_early &= _is_listed(Index, count, early // size, (FIRST + size - 1) // size)
        see_near &= _is_listed(Index, count, near // size, (NEAR + size - 2) // size + 1)
    z_early = _seen(q, K, early, see_early, Valid, batch, keys, position, exists, scale, dim, k_row, D, CAUSAL,
                    PRECISION)  # fmt: skip
    z_near = _seen(q, K, near, see_near, Valid, batch, keys, position, exists, scale, dim, k_row, D, CAUSAL,
                   PRECISION)  # fmt: skip

    peak = tl.maximum(tl.max(z_early, 1), tl.max(z_near, 1))
    if PROBE:
        z_far = tl.full([M, FIRST], float("-inf"), tl.float32)
        for far in range(FIRST, begin if CAUSAL else keys, PROBE * FIRST):
            key = far + early * PROBE
            there = (key < begin) | ((key >= begin + NEAR) & (key < keys))
            z = _seen(q, K, key, there, Valid, batch, keys, position, exists, scale, dim, k_row, D, CAUSAL, PRECISION)
            z_far = tl.maximum(z_far, z)  # the keys of two columns differ
        peak = tl.maximum(peak, tl.max(z_far, 1))
    some = peak > float("-inf")
    tau = tl.where(some, peak, 0.0) - 1
    for _ in range(STEPS):
        weight, slope = powers(tl.maximum(z_early - tau[:, None], 0.0), exponent, KIND)
        mass, total = tl.sum(weight, 1), tl.sum(slope, 1)
        weight, slope = powers(tl.maximum(z_near - tau[:, None], 0.0), exponent, KIND)
        mass, total = mass + tl.sum(weight, 1), total + tl.sum(slope, 1)
        if PROBE:
            weight, slope = powers(tl.maximum(z_far - tau[:, None], 0.0), exponent, KIND)
            mass, total = mass + tl.sum(weight, 1), total + tl.sum(slope, 1)
        tau += newton_step(mass, total, exponent, KIND)
    tau -= 4e-6 * (1 + tl.abs(tau))  # what rounding may have added
    total = tl.num_programs(0) // tiles * queries
    for above in tl.static_range(2):
        origins = (tau + above * HIGHER)[:, None]
        weight, slope = powers(tl.maximum(z_early - origins, 0.0), exponent, KIND)
        mass, gradient = tl.sum(weight, 1), tl.sum(slope, 1)
        weight, slope = powers(tl.maximum(z_near - origins, 0.0), exponent, KIND)
        place = Sums + 2 * above * total + row * queries + index
        tl.store(place, mass + tl.sum(weight, 1), mask=inside)
        tl.store(place + total, gradient + tl.sum(slope, 1), mask=inside)
    tau = tl.where(exists, tl.where(some, tau, float("-inf")), float("inf"))
    tl.store(Bound + row * queries + index, tau, mask=inside)


@triton.jit
def _is_listed(Index, count, tile, most):
    """Tell which of some tiles, of which at most so many consecutive ones differ, an ascending list names."""
    lowest = tl.min(tile, 0)
    lane = tl.arange(0, 128)
    listed = tile < 0
    for begin in range(0, count, 128):
        named = tl.load(Index + begin + lane, mask=begin + lane < count, other=-1).to(tl.int32)
        for number in range(most):
            one = tl.max((named == lowest + number).to(tl.int32), 0) > 0
            listed |= (tile == lowest + number) & one
    return listed


@triton.jit
def _seen(
    q, K, key, there, Valid, batch, keys, position, exists, scale, dim, k_row, D: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute z of the rows and keys of a program, `-inf` where a row does not see a key."""
    if Valid is not None:
        there &= tl.load(Valid + batch * keys + key, mask=there, other=0) != 0
    k = load_rows(K, key.to(tl.int64) * k_row, there, dim, D)
    sees = there[None, :] & exists[:, None]
    if CAUSAL:
        sees &= key[None, :] <= position[:, None]
    return tl.where(sees, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))


@triton.jit(do_not_specialize=[*LENGTHS, "groups", "kept"])
def _sweep(
    Q, K, Scale, factor, Exponent, First, Packed, Bound, Sums, Words, Numbers, Counts, Totals, Turn, Queue, groups,
    kept,
    Index, Listed, i_batch, i_list, i_tile, lists, query_tiles, rows, lead, size, queries, keys, heads, capacity, width,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, START: tl.constexpr, NEAR: tl.constexpr,
    FIRST: tl.constexpr, HIGHER: tl.constexpr, EVERY: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr,
    W: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write words, numbers and counts of the groups of M rows, and put them into the queues.

    Programs with the most keys begin first."""
    parts = tl.cdiv(queries, M) if Index is None else query_tiles * (rows // M)
    pairs = tl.num_programs(0) // parts  # B * Hq
    tile = parts - 1 - tl.program_id(0) // pairs
    row = (tl.program_id(0) % pairs).to(tl.int64)
    batch, head = row // heads, row % heads
    index = tile * M - lead + tl.arange(0, M)
    inside = (index >= 0) & (index < queries)
    position = origin_of(First, batch, queries, keys) + index
    scale = scale_of(Scale, factor, head)
    dim = tl.arange(0, PADDED)
    q = load_rows(Q + batch * q_batch + head * q_head, index.to(tl.int64) * q_row, inside, dim, D)
    take_over(EARLY)
    bound = tl.load(Bound + row * queries + index, mask=inside, other=float("inf"))
    exists = bound < float("inf")
    if scale < 0:  # products are compared before they are scaled
        q = -q
    scale = tl.maximum(tl.abs(scale), 1e-30)
    inverse = 1 / scale
    limit, steep = _limits(bound, inverse)
    K += batch * k_batch + head // GROUP * k_head

    lane = tl.arange(0, N)
    word_of = tl.arange(0, 4)
    within = lane[:, None] * k_row + dim[None, :]  # of a block of keys
    group = tile * (M // R) + tl.arange(0, M // R)
    if Index is None:
        last_group = tl.cdiv(queries, R)
        there = group < last_group
        group += row * last_group
        steps = 0
    else:
        share = heads // lists
        job = (batch * lists + head // share) * query_tiles + tile * M // rows
        there = group >= 0
        group = (job * share + head % share) * (rows // R) + group % (rows // R)
        Index += batch * i_batch + head // share * i_list + tile * M // rows * i_tile
        steps = tl.load(Listed + job) * (size // N)
    out = group.to(tl.int64) * capacity
    count = tl.zeros([M // R], tl.int32)
    # All rows see the keys before `full`, which need no mask.
    first, last = tl.min(tl.where(exists, position, keys), 0), tl.max(tl.where(exists, position, -1), 0)
    end = tl.minimum(last + 1, keys) if CAUSAL else tl.where(last >= 0, keys, 0)
    full = tl.minimum(first + 1, end) // N * N if CAUSAL else end // N * N
    # Keys over which the first bound was taken are counted already: those before `FIRST` and near the rows.
    lowest = origin_of(First, batch, queries, keys) + tile * M - lead
    near_begin = tl.minimum(lowest + START - NEAR if CAUSAL else lowest + START // 2 - NEAR // 2, keys - NEAR)
    near_end = lowest + M + NEAR
    exponent = exponent_of(Exponent, head, KIND)
    total, place = pairs * queries, Sums + row * queries + index
    low_mass_before = tl.load(place, mask=inside, other=0.0)
    low_slope_before = tl.load(place + total, mask=inside, other=0.0)
    high_mass_before = tl.load(place + 2 * total, mask=inside, other=0.0)
    high_slope_before = tl.load(place + 3 * total, mask=inside, other=0.0)
    start, higher = bound[:, None], bound[:, None] + HIGHER
    low_mass, low_slope = tl.zeros([M, 4], tl.float32), tl.zeros([M, 4], tl.float32)
    high_mass, high_slope = tl.zeros([M, 4], tl.float32), tl.zeros([M, 4], tl.float32)
    whole_steps = full // N
    if Index is None:
        steps = tl.cdiv(end, N)
    else:
        whole_steps = steps
        if steps > 0:
            while (whole_steps > 0) & (_begin_of(Index, tl.maximum(whole_steps - 1, 0), size, N) + N > full):
                whole_steps -= 1
    for step in range(0, whole_steps):
        begin = _begin_of(Index, step, size, N)
        k = tl.load(K + begin.to(tl.int64) * k_row + within, mask=(dim < D)[None, :], other=0.0)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # By multiplications and additions, of which the GPU does twice as many as of comparisons and selections.
        passes = tl.minimum(tl.maximum(product * STEEP - steep[:, None], 0.0), 1.0)
        count = _keep(
            passes, begin, step, Packed, batch, width, Words, Numbers, out, count, capacity, there, word_of, M, N, R
        )  # fmt: skip
        whole = (begin >= FIRST) & ((begin + N <= near_begin) | (begin >= near_end))
        if Packed is not None:
            words = tl.load(Packed + batch * width + begin // N * 4 + word_of)
            whole &= tl.min((words == ((1 << (N // 4 - 1)) * 2 - 1)).to(tl.int32), 0) > 0
        columns = tl.permute(tl.reshape(product, [M, N // 8, 4, 2]), [0, 2, 1, 3])
        largest = tl.max(tl.reshape(columns, [M, 4, N // 4]), 2) * scale
        largest = tl.where(whole, largest, float("-inf"))
        weight, slope = powers(tl.maximum(largest - start, 0.0), exponent, KIND)
        low_mass += weight
        low_slope += slope
        weight, slope = powers(tl.maximum(largest - higher, 0.0), exponent, KIND)
        high_mass += weight
        high_slope += slope
        if step % EVERY == EVERY - 1:
            bound = _risen(bound, start, low_mass, low_slope, low_mass_before, low_slope_before, exponent, KIND)
            bound = _risen(bound, higher, high_mass, high_slope, high_mass_before, high_slope_before, exponent, KIND)
            limit, steep = _limits(bound, inverse)
    tl.store(Bound + row * queries + index, bound, mask=inside)
    for step in tl.range(whole_steps, steps, num_stages=1):
        begin = _begin_of(Index, step, size, N)
        key = begin + lane
        k = load_rows(K, key.to(tl.int64) * k_row, key < keys, dim, D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        sees = (product > limit[:, None]) & (key < keys)[None, :]
        if CAUSAL:
            sees &= key[None, :] <= position[:, None]
        passes = tl.where(sees, 1.0, 0.0)
        count = _keep(
            passes, begin, step, Packed, batch, width, Words, Numbers, out, count, capacity, there, word_of, M, N, R
        )  # fmt: skip
    tl.store(Counts + group, count, mask=there)
    tl.debug_barrier()  # the words are written
    stored, word = tl.where(there, tl.minimum(count, capacity), 0) * 4, tl.arange(0, W)
    total = tl.zeros([M // R], tl.int32)
    for begin in range(0, tl.max(stored, 0), W):
        bits = tl.load(
            Words + out[:, None] * 4 + (begin + word)[None, :], mask=begin + word[None, :] < stored[:, None], other=0
        )
        total += tl.sum(ones_of(bits.to(tl.uint32, bitcast=True)), 1)
    total = tl.where(count > capacity, MANY + 1, total)
    tl.store(Totals + group, total, mask=there)
    fits = there & (total > FEW) & (total <= kept)
    place, some = _places(Turn + 3, there & (total > FEW) & (total > kept))
    tl.store(Queue + place, group, mask=some)
    place, some = _places(Turn + 1, fits & (total > MANY))
    tl.store(Queue + groups + place, group, mask=some)
    place, some = _places(Turn + 2, fits & (total <= MANY))
    tl.store(Queue + 2 * groups - 1 - place, group, mask=some)


@triton.jit
def _limits(bound, inverse):
    """Return what products must exceed, and that times STEEP.

    A product that differs from the limit does so by 1 / STEEP at least, since the limit is not close to 0."""
    limit = tl.minimum(bound * inverse, 1e20)
    limit = tl.where(tl.abs(limit) < 3e-11, -3e-11, limit)
    return limit, limit * STEEP


@triton.jit
def _places(Counter, some):
    """Return the place of each of some groups behind those that other programs have counted, and these groups."""
    one = some.to(tl.int32)
    return tl.atomic_add(Counter, tl.sum(one, 0), sem="relaxed") + tl.cumsum(one, 0) - one, some


@triton.jit
def _begin_of(Index, step, size, N: tl.constexpr):
    """Return the first key of a block of N keys, counted in all keys or in listed tiles."""
    begin = step * N
    if Index is not None:
        begin = tl.load(Index + begin // size).to(tl.int32) * size + begin % size
    return begin


def takes_lists(lists: Lists) -> bool:
    """Tell whether the sweep runs over such tiles: of a group of queries and 16 keys at least."""
    return all(size >= GROUP_ROWS and size & (size - 1) == 0 for size in (lists.rows, lists.size))


@triton.jit
def _joined(bits, M: tl.constexpr, length: tl.constexpr, weight: tl.constexpr):
    """Add each second number of so many, times a weight, to the one before."""
    if length > 1:
        low, high = tl.split(tl.reshape(bits, [M, 4, length // 2, 2]))
        bits = low + high * weight
    return bits


@triton.jit
def _keep(
    passes, begin, step, Packed, batch, width, Words, Numbers, out, count, capacity, there, word_of, M: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Store the block of keys from `begin` on for all groups, or where it has a bit; return the counts of blocks."""
    bits = tl.permute(tl.reshape(passes, [M, N // 8, 4, 2]), [0, 2, 1, 3])
    bits = _joined(_joined(_joined(_joined(bits, M, N // 4, 2.0), M, N // 8, 4.0), M, N // 16, 16.0), M, N // 32, 256.0)
    words = (bits + 8388608.0).to(tl.int32, bitcast=True) & 0xFFFF  # the last digits of a number from 2 ** 23 on
    if N == 128:
        low, high = tl.split(words)
        words = low | (high << 16)
    else:
        words = tl.reshape(words, [M, 4])
    words = tl.reduce(tl.reshape(words, [M // R, R, 4]), 1, _or)
    if Packed is not None:
        words &= tl.load(Packed + batch * width + begin // N * 4 + word_of)[None, :]
    if Numbers is None:
        tl.store(Words + (out + step)[:, None] * 4 + word_of[None, :], words, mask=there[:, None])
        count += 1
    else:
        some = tl.max((words != 0).to(tl.int32), 1)
        keep = there & (some > 0) & (count < capacity)
        place = out + count
        tl.store(Words + place[:, None] * 4 + word_of[None, :], words, mask=keep[:, None])
        tl.store(Numbers + place, tl.zeros([M // R], tl.int32) + begin // N, mask=keep)
        count += some
    return count


@triton.jit
def _risen(bound, origin, mass, slope, mass_before, slope_before, exponent, KIND: tl.constexpr):
    """Return the bound after a step of Newton's method from an origin, where the mass is at least 1 there."""
    mass, slope = tl.sum(mass, 1) + mass_before, tl.sum(slope, 1) + slope_before
    risen = tl.sum(origin, 1) + newton_step(mass, slope, exponent, KIND)
    risen -= 4e-6 * (1 + tl.abs(risen))
    return tl.where((mass >= 1) & (bound > float("-inf")), tl.maximum(bound, risen), bound)
