"""Describe who attends to whom, as the kernels see it: jobs, groups of rows, and the keys of a list.

A job is one tile of queries of one list of tiles, see `hf_sparse.ops.entmax.layout`; its rows are those of all query
heads that share the list. Without lists a job is all queries of a head. A group is a number of consecutive rows of a
job, the last one of a job may have fewer.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import Lists, origin_of
from hf_sparse.ops.entmax.triton.sweep import GROUP_ROWS
from hf_sparse.ops.triton.sizes import pieces

LENGTHS = ["queries", "keys", "heads", "lists", "query_tiles", "rows", "lead", "size", "share"]


def rows_of_job(query: Tensor, lists: Lists | None) -> int:
    """Return how many rows a job has."""
    heads, queries = query.shape[1:3]
    return queries if lists is None else heads // lists.index.shape[1] * lists.rows


def group_count(query: Tensor, lists: Lists | None, rows: int = GROUP_ROWS) -> int:
    """Return how many groups of so many rows there are."""
    jobs = query.shape[0] * query.shape[1] if lists is None else lists.counts.numel()
    return jobs * pieces(rows_of_job(query, lists), rows)


def arguments_of(query: Tensor, key: Tensor, lists: Lists | None) -> tuple[Any, ...]:
    """Return the arguments of a kernel from `Index` to `share`."""
    heads, queries = query.shape[1:3]
    keys = key.shape[2]
    if lists is None:
        return (None, None, 0, 0, 0, queries, keys, heads, heads, 1, queries, 0, 1, 1)
    number, tiles = lists.index.shape[1:3]
    sizes = (queries, keys, heads, number, tiles, lists.rows, lists.lead, lists.size, heads // number)
    return (lists.index, lists.counts, *lists.index.stride()[:3], *sizes)


@triton.jit
def turn_of_group(turn, groups, query_tiles, rows, share, M: tl.constexpr):
    """Return the group whose turn it is: the last rows of all texts and heads first, since in causal order they have
    the most keys."""
    each = tl.cdiv(share * rows, M) * query_tiles  # of one text and list
    return turn % (groups // each) * each + each - 1 - turn // (groups // each)


@triton.jit
def rows_of_group(
    group, Index, First, Valid, queries, keys, heads, lists, query_tiles, rows, lead, share, M: tl.constexpr
):  # fmt: skip
    """Return job, batch, list and tile of a group of M rows; head, index, position of each row, whether it exists, and
    whether it is a row of the output."""
    blocks = tl.cdiv(share * rows, M)
    job = group // blocks
    row = group % blocks * M + tl.arange(0, M)
    if Index is None:  # these divisions take hundreds of instructions
        number, batch, index = job % heads, job // heads, row
        inside = row < queries
        tile = number * 0
    else:
        tile, number, batch = job % query_tiles, job // query_tiles % lists, job // (query_tiles * lists)
        index = tile * rows - lead + row % rows
        inside = (row < share * rows) & (index >= 0) & (index < queries)
    # What addresses are made of has 64 bits, but their division takes a hundred instructions.
    job, tile, number, batch = job.to(tl.int64), tile.to(tl.int64), number.to(tl.int64), batch.to(tl.int64)
    position = origin_of(First, batch, queries, keys) + index
    exists = inside & (position >= 0) & (position < keys)
    if Valid is not None:
        exists &= tl.load(Valid + batch * keys + position, mask=exists, other=0) != 0
    head = number + tl.zeros([M], tl.int64) if Index is None else number * share + tl.minimum(row // rows, share - 1)
    return job, batch, number, tile, head, index, position, exists, inside


@triton.jit
def marked_rows(group, Lengths, rows, share, M: tl.constexpr, R: tl.constexpr, LEAST: tl.constexpr):
    """Tell which of M rows belong to a group of R rows that has a mark, from LEAST to -1, for a length."""
    blocks = tl.cdiv(share * rows, M)
    job, row = group // blocks, group % blocks * M + tl.arange(0, M)
    own = job * tl.cdiv(share * rows, R) + row // R
    length = tl.load(Lengths + own, mask=row < share * rows, other=0)
    return (length >= LEAST) & (length < 0)


@triton.jit
def keys_of_slots(slot, end, Index, Valid, batch, keys, size):
    """Return the key of each slot of a list, or of all keys, and whether there is one."""
    if Index is None:
        key, there = slot, slot < end
    else:
        tile = tl.load(Index + slot // size, mask=slot < end, other=0).to(tl.int32)
        key = tile * size + slot % size
        there = (slot < end) & (key < keys)
    if Valid is not None:
        there &= tl.load(Valid + batch * keys + key, mask=there, other=0) != 0
    return key, there
