"""Take a decoding step over the tiles that clusters choose: two kernels, of which the first codes the newest token too.

`cluster_lists` is the choice alone, for a step whose codes are made elsewhere.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hf_sparse.ops.predictors.profile import BINS
from hf_sparse.ops.predictors.triton.chosen_tiles import attend_best
from hf_sparse.ops.predictors.triton.cluster_ranks import rank_tiles
from hf_sparse.ops.triton.repeated import RepeatedLaunch
from hf_sparse.ops.triton.sizes import padded

MOST_KEYS = 2048  # that a list may have

_AT_ONCE = 1024  # keys whose tiles are ranked at a time
_RANKS = 1024  # that are counted at a time
_PROGRAMS = 512  # of the first kernel: about four for each multiprocessor of a large GPU
_ALIGNED = 16  # bytes of addresses, elements of strides
_ROUNDED = 256  # ranks of a list have room for a multiple of so many tiles


@dataclass(frozen=True)
class Lists:
    """Say which tiles a query attends to.

    Attributes:
        size, rows, window, global_tokens: as in `hf_sparse.ops.tiles.select.step_tiles`.
        count: tiles of a list, the own tile and those of window and global tokens included.
        grouped: one list for the query heads of a KV head.
    """

    size: int
    rows: int
    window: int
    global_tokens: int
    count: int
    grouped: bool


@dataclass(frozen=True)
class Projections:
    """Hold what makes codes and scores of queries and keys; all tensors are contiguous.

    Attributes:
        query: `[Hq, D, r]`, or `[Hkv, D, r]` where it is that of the keys too.
        bias: `[Hq, r]`, or None.
        key: `[Hkv, D, r]`.
        centroids: `[Hkv, C, r]`.
        profile: `[Hq, BINS]`, see `hf_sparse.ops.predictors.profile`, or None.
    """

    query: Tensor
    bias: Tensor | None
    key: Tensor
    centroids: Tensor
    profile: Tensor | None


class ClusterStep:
    """Launch the steps of a layer, which differ in length and addresses alone.

    Args:
        query: of a step, `[B, Hq, 1, D]`.
        key, value: of the cache, `[B, Hkv, T, D]`.
        lists: what is chosen.
        projections: of the queries and keys.
        kind, is_log: see `hf_sparse.ops.entmax.step.Scales`.
        tiles, ranks, programs, gathered: sizes of the kernels, for tests.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lists: Lists,
        projections: Projections,
        *,
        kind: int,
        is_log: bool,
        tiles: int | None = None,
        ranks: int = _RANKS,
        programs: int = _PROGRAMS,
        gathered: int | None = None,
    ) -> None:
        heads, dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
        self.lists, self.programs = lists, programs
        self.number, self.share = (kv_heads, heads // kv_heads) if lists.grouped else (heads, 1)
        self.clusters, self.rank = projections.centroids.shape[1:]
        self.tiles = max(1, _AT_ONCE // lists.size) if tiles is None else tiles
        self.width_of_slots = triton.next_power_of_2(lists.count * lists.size)
        together = 0
        for tensor in (key, value):
            together |= tensor.stride(0) | tensor.stride(1) | tensor.stride(2) | tensor.data_ptr()
        self.align = 1 if together % _ALIGNED else _ALIGNED
        shared = (heads // kv_heads, self.share, lists.size)
        self._rank = RepeatedLaunch(
            rank_tiles,
            (
                *shared, lists.rows, BINS, triton.next_power_of_2(self.clusters), self.tiles, dim, padded(dim),
                projections.bias is None,
            ),
        )  # fmt: skip
        if gathered is None:
            gathered = max(16, min(128, 8192 // padded(dim)))
        self._attend = RepeatedLaunch(
            attend_best,
            (
                *shared, ranks, self.width_of_slots, min(gathered, self.width_of_slots), dim, padded(dim), self.align,
                kind, is_log,
            ),
        )  # fmt: skip

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        newest: tuple[Tensor, Tensor],
        codes: tuple[Tensor, Tensor],
        projections: Projections,
        scale: Tensor,
        exponent: Tensor | None,
        factor: float,
        order: Tensor | None,
        position: Tensor | None,
        place: Tensor | None = None,
    ) -> Tensor:
        """Take the step; returns the attention `[B, Hq, 1, D]`, contiguous.

        Args:
            query: `[B, Hq, 1, D]`, contiguous along the last dimension, as the following.
            key, value: `[B, Hkv, T, D]`, whose last row is written, or that of `place`.
            newest: that row, `[B, Hkv, 1, D]` each.
            codes: of queries `[B, Hq, T, r]` float32 and keys `[B, Hkv, T, 1]` int64, whose row is written likewise.
            projections: the tensors.
            scale, exponent, factor: see `hf_sparse.ops.entmax.step.Scales`.
            order: `[B, T]` int64, where the tokens of a text lie, the newest one at the end, or None: in order.
            position: `[B]` int64, where the query stands in its text, -1 for padding; None for the last place.
            place: `[1]` int64, the row of the newest token, if not the last one: those behind it hold nothing. Then
                there has to be a `position`.
        """
        batch, heads, _, dim = query.shape
        keys, lists = key.shape[2], self.lists
        total = -(-keys // lists.size)
        blocks = -(-total // self.tiles)
        splits = max(1, min(blocks, -(-self.programs // (batch * self.number))))
        width = -(-total // _ROUNDED) * _ROUNDED
        tables = batch * self.number * width
        chosen = tables + batch * self.number * splits * self.share * self.clusters
        products = chosen + batch * self.number * lists.count
        scratch = torch.empty(products + batch * heads * self.width_of_slots, dtype=torch.int64, device=query.device)
        output = torch.empty((batch, heads, 1, dim), dtype=query.dtype, device=query.device)
        q_batch, q_head, _, _ = query.stride()
        k_batch, k_head, k_row, _ = key.stride()
        v_batch, v_head, v_row, _ = value.stride()
        o_batch = 0 if order is None else order.stride(0)
        p_batch = 0 if position is None else position.stride(0)
        new_key, new_value = newest
        of_queries, of_keys = codes
        self._rank(
            (splits, self.number, batch),
            [
                None, query, new_key, new_value, key, value, of_queries, of_keys, projections.query, projections.bias,
                projections.key, projections.centroids, projections.profile, order, position, place, scratch,
                keys, total, width, tables, heads, self.clusters, self.rank, lists.window, lists.global_tokens,
                q_batch, q_head, *new_key.stride()[:2], *new_value.stride()[:2], k_batch, k_head, k_row, v_batch,
                v_head, v_row, *of_queries.stride()[:3], *of_keys.stride()[:3], o_batch, p_batch,
            ],
        )  # fmt: skip
        align = self.align
        self._attend(
            (self.number, batch, 1),
            [
                scratch, None, query, key, value, scale, exponent, order, position, output, keys, total, width, chosen,
                products, lists.count, factor, heads, q_batch, q_head, k_batch // align, k_head // align,
                k_row // align, v_batch // align, v_head // align, v_row // align, o_batch, p_batch,
            ],
        )  # fmt: skip
        return output


_kernels: dict[Hashable, tuple[RepeatedLaunch, RepeatedLaunch]] = {}


def cluster_lists(
    points: Tensor,
    codes: Tensor,
    centroids: Tensor,
    profile: Tensor | None,
    position: Tensor,
    lists: Lists,
    *,
    tiles: int | None = None,
    ranks: int = _RANKS,
    programs: int = _PROGRAMS,
) -> Tensor:
    """Return the listed tiles, `[B, H, 1, count]` int64 in ascending order, -1 behind the last.

    Args:
        points: `[B, Hq, r]` float32, mean points of the queries that describe each list.
        codes: `[B, Hkv, S, 1]` int64, the cluster of each key; there may be anything behind the position.
        centroids: `[Hkv, C, r]`.
        profile: `[Hq, BINS]`, see `hf_sparse.ops.predictors.profile`, or None.
        position: `[B]` int64, where the queries stand.
        lists: what is chosen.
        tiles, ranks, programs: sizes of the kernels, for tests.
    """
    (batch, heads, rank), (_, kv_heads, keys, _) = points.shape, codes.shape
    clusters, total = centroids.shape[1], -(-keys // lists.size)
    number, share = (kv_heads, heads // kv_heads) if lists.grouped else (heads, 1)
    tiles = max(1, _AT_ONCE // lists.size) if tiles is None else tiles
    shared = (heads // kv_heads, share, lists.size)
    of_ranks = (*shared, lists.rows, BINS, triton.next_power_of_2(clusters), tiles, 16, 16, False)
    name = (codes.device, centroids.dtype, None if profile is None else profile.dtype, of_ranks, ranks)
    kernels = _kernels.get(name)
    if kernels is None:
        rest = (*shared, ranks, 16, 16, 16, 16, 1, 2, False)
        kernels = RepeatedLaunch(rank_tiles, of_ranks), RepeatedLaunch(attend_best, rest)
        _kernels[name] = kernels
    splits = max(1, min(-(-total // tiles), -(-programs // (batch * number))))
    tables = batch * number * total
    scratch = torch.empty(tables + batch * number * splits * share * clusters, dtype=torch.int64, device=codes.device)
    index = torch.empty((batch, number, 1, lists.count), dtype=torch.int64, device=codes.device)
    nothing: list[Any] = [None] * 6
    kernels[0](
        (splits, number, batch),
        [
            points.contiguous(), *nothing, codes, *nothing[:3], centroids.contiguous(), profile, None, position, None,
            scratch, keys, total, total, tables, heads, clusters, rank, lists.window, lists.global_tokens,
            *(0,) * 15, *codes.stride()[:3], 0, position.stride(0),
        ],
    )  # fmt: skip
    kernels[1](
        (number, batch, 1),
        [
            scratch, index, *nothing, position, None, keys, total, total, 0, 0, lists.count, 0.0, heads, *(0,) * 9,
            position.stride(0),
        ],
    )  # fmt: skip
    return index
