"""Rank the tiles of keys for one causal query per head in one kernel, from the clusters of the keys.

It computes what `hf_sparse.methods.sparsefinder` defines for clusters of any size: the mass of a tile is the sum of
`exp(-|q - c|^2)` over the centroids c of its keys, times the profile of the distance; and then the order in which
`hf_sparse.ops.tiles.select.step_tiles` takes tiles.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.predictors.profile import BINS

_AT_ONCE = 1024  # keys

_compiled: dict[Hashable, Any] = {}


def cluster_ranks(
    points: Tensor,
    codes: Tensor,
    centroids: Tensor,
    profile: Tensor | None,
    position: Tensor,
    *,
    size: int,
    rows: int,
    window: int,
    global_tokens: int,
    grouped: bool,
) -> Tensor:
    """Return the ranks of all tiles, `[B, H, 1, nk]` int64; negative for those that may not be listed.

    Args:
        points: `[B, Hq, r]` float32, mean points of the queries that describe each list.
        codes: `[B, Hkv, S, 1]` int64, the cluster of each key; there may be anything behind the position.
        centroids: `[Hkv, C, r]`.
        profile: `[Hq, BINS]`, see `hf_sparse.ops.predictors.profile`, or None.
        position: `[B]` int64, where the queries stand.
        size, rows, window, global_tokens: as in `step_tiles`.
        grouped: one list for the query heads of a KV head.
    """
    (batch, heads, rank), (_, kv_heads, keys, _) = points.shape, codes.shape
    group, clusters = heads // kv_heads, centroids.shape[1]
    total = -(-keys // size)
    lists, share = (kv_heads, group) if grouped else (heads, 1)
    ranks = torch.empty((batch, lists, 1, total), dtype=torch.int64, device=codes.device)
    tables = torch.empty((batch, heads, clusters), dtype=torch.float64, device=codes.device)
    points, centroids = points.contiguous(), centroids.contiguous()
    constants = (group, share, size, BINS, triton.next_power_of_2(clusters), max(1, _AT_ONCE // size))
    arguments = (
        points, codes, centroids, profile, position, tables, ranks, *codes.stride()[:3], position.stride(0),
        keys, total, heads, clusters, rank, window, global_tokens, rows, *constants,
    )  # fmt: skip
    dtypes = (centroids.dtype, None if profile is None else profile.dtype)
    name = (codes.device, dtypes, heads, clusters, rank, rows, constants)
    if name in _compiled:  # Triton would look at every argument again
        _compiled[name][batch, lists, 1](*arguments)
        return ranks
    binary = _ranks[batch, lists, 1](*arguments, num_warps=4)
    if binary is not None:  # not so in Triton's interpreter
        _compiled[name] = binary
    return ranks


@triton.jit(
    do_not_specialize=["c_batch", "c_head", "c_row", "p_batch", "keys", "total", "window", "global_tokens"],
    do_not_specialize_on_alignment=["Codes", "Position"],
)
def _ranks(
    Points,
    Codes,
    Centroids,
    Profile,
    Position,
    Tables,
    Ranks,
    c_batch,
    c_head,
    c_row,
    p_batch,
    keys,
    total,
    heads,
    clusters,
    rank,
    window,
    global_tokens,
    rows,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    BINS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    W: tl.constexpr,
):
    batch, number, lists = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first_head = number * SHARE
    kv = first_head // GROUP
    cluster, tile, inside = tl.arange(0, CLUSTERS), tl.arange(0, W), tl.arange(0, SIZE)
    for member in range(SHARE):  # the weight of every cluster for every head
        row = batch * heads + first_head + member
        distance = tl.zeros([CLUSTERS], tl.float32)
        for place in range(rank):
            center = tl.load(Centroids + (kv * clusters + cluster) * rank + place, mask=cluster < clusters, other=0.0)
            away = tl.load(Points + row * rank + place) - center.to(tl.float32)
            distance += away * away
        distance = tl.where(cluster < clusters, distance, float("inf"))
        weight = tl.exp((tl.min(distance, 0) - distance).to(tl.float64))
        tl.store(Tables + row * clusters + cluster, weight, mask=cluster < clusters)
    tl.debug_barrier()  # the tables are written

    position = tl.load(Position + batch * p_batch).to(tl.int32)
    own = position // SIZE
    near = tl.maximum(position // rows * rows - (window - 1), 0) // SIZE
    Codes += batch * c_batch + kv.to(tl.int64) * c_head
    for begin in range(0, total, W):
        index = begin + tile
        key = index[:, None] * SIZE + inside[None, :]
        there = (key < keys) & (key <= position)
        code = tl.load(Codes + key.to(tl.int64) * c_row, mask=there, other=-1)
        there &= (code >= 0) & (code < clusters)
        away = tl.abs(index - own)
        octave = tl.zeros([W], tl.int32)
        for power in tl.static_range(1, BINS // 4):
            octave += (away >= (4 << power)).to(tl.int32)
        column = tl.where(away < 4, away, 4 + 4 * octave + ((away - (4 << octave)) >> octave))
        column = tl.minimum(column, BINS - 1)
        peak = tl.full([W], float("-inf"), tl.float32)
        mass = tl.zeros([W], tl.float32)
        for member in range(SHARE):
            head = first_head + member
            weight = tl.load(Tables + (batch * heads + head) * clusters + code, mask=there, other=0.0)
            score = tl.log(tl.maximum(tl.sum(weight, 1), 1e-30)).to(tl.float32)
            if Profile is not None:
                score += tl.log(tl.maximum(tl.load(Profile + head * BINS + column).to(tl.float32), 1e-4))
            higher = tl.maximum(peak, score)
            mass = mass * tl.exp(peak - higher) + tl.exp(score - higher)
            peak = higher
        score = peak + tl.log(mass) if SHARE > 1 else peak
        always = (index == own) | (index * SIZE < global_tokens) | ((index >= near) & (window > 0))
        level = always.to(tl.int64) + (index == own).to(tl.int64)
        level = tl.where(index <= own, level, -1)
        bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True).to(tl.int64)
        ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2147483648
        value = (level << 56) + (ascending << 24) + (total - 1 - index).to(tl.int64)
        tl.store(Ranks + (batch * lists + number) * total + index, value, mask=index < total)
