"""Attend with entmax on the GPU, as one differentiable function: over all keys, or over listed tiles of keys."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.entmax.triton.backward import gradients
from hf_sparse.ops.entmax.triton.common import Numbers, kind_of, per_head, scale_and_factor
from hf_sparse.ops.entmax.triton.few import Few, few_sizes
from hf_sparse.ops.entmax.triton.groups import Attended, Buffered, attend_groups, buffered_sizes
from hf_sparse.ops.entmax.triton.jobs import Lists
from hf_sparse.ops.entmax.triton.sweep import (
    EVERY,
    FIRST,
    Blocks,
    Candidates,
    blocks_of,
    candidates,
    packed_bits,
    takes_lists,
)
from hf_sparse.ops.entmax.triton.tiles import attend_tiles
from hf_sparse.ops.triton.replay import replayed
from hf_sparse.ops.triton.sizes import pieces

CAPACITY = 1024  # blocks of keys with a candidate that are kept for a group of queries
MOST = 32768  # candidates that are kept for a group, or half of all keys
KEPT = 4096  # candidates that most buffers take, and keys with weight that a backward has lists of, or an eighth of all


class Settings(NamedTuple):
    """Describe who attends to whom, and the sizes of the programs.

    Attributes:
        kind: of the exponent, see `kind_of`.
        factor: multiplies the products of all heads, beside their scales.
        causal: whether a query sees the keys up to its position only.
        trains: whether there will be a backward.
        tiles_of: keys and queries of a listed tile, and the rows of the first one that lie before the first query;
            None for all keys.
        capacity, most, kept: blocks and candidates that a group of queries may have, and candidates that the buffers of
            most programs take, which are as many as the keys with weight of a group that a backward has a list of.
        sweep, tiles: sizes of the programs; chosen by shape and dtype by default.
        near, probe: keys of the beginning over which the first bound is taken, and the distance of those behind them.
        start: sizes of the kernel of the first bound.
        every: blocks of keys after which the bound rises.
        few, buffered: sizes of the kernels for groups with few candidates and for the others.
    """

    kind: int
    factor: float
    causal: bool
    trains: bool
    tiles_of: tuple[int, int, int] | None = None
    capacity: int = CAPACITY
    most: int | None = None
    kept: int | None = None
    sweep: Blocks | None = None
    tiles: Blocks | None = None
    near: int = FIRST
    probe: int | None = None
    start: Blocks | None = None
    every: int = EVERY
    few: Few | None = None
    buffered: Buffered | None = None

    def lists(self, index: Tensor | None, counts: Tensor | None) -> Lists | None:
        """Return the lists of tiles with their sizes."""
        if self.tiles_of is None or index is None or counts is None:
            return None
        return Lists(index, counts, *self.tiles_of)

    def limits(self, keys: int) -> tuple[int, int]:
        """Return how many candidates of a group large buffers take in a text of so many keys, and how many others."""
        most = max(MOST, keys // 2) if self.most is None else self.most
        return most, max(KEPT, keys // 8) if self.kept is None else self.kept

    def marks(self, query: Tensor, key: Tensor, lists: Lists | None, backward: bool = False) -> bool:
        """Tell whether a group may have more keys than the buffers take, or than the lists do that a backward reads."""
        reached = key.shape[2] if lists is None else min(key.shape[2], lists.index.shape[3] * lists.size)
        too_many_blocks = sweeps(lists) and blocks_of(query, key, lists, self.sweep)[1] > self.capacity
        most, kept = self.limits(key.shape[2])
        return (most if sweeps(lists) and not backward else min(most, kept)) < reached or too_many_blocks


def sweeps(lists: Lists | None) -> bool:
    """Tell whether candidates are looked for first."""
    return lists is None or takes_lists(lists)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
    lists: Lists | None = None,
    **sizes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `[B, Hq, Tq, D]`, tau `[B, Hq, Tq]` float32 and the size of the support `[B, Hq, Tq]` int32.

    Args:
        query, key, value, alpha, scaling, causal, valid, first_query: as in `hf_sparse.ops.entmax.entmax_attention`,
            of equal dtype and checked.
        lists: tiles of keys; all keys by default.
        sizes: fields of `Settings`, for tests.
    """
    heads, device = query.shape[1], query.device
    kind = kind_of(1.0 / (alpha - 1.0))
    exponent = None if kind else per_head(1 / (alpha - 1), heads, device)
    scale, factor = scale_and_factor(scaling, alpha)
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    # Asked here: inside the function gradients are off, and its context does not know of `no_grad`.
    leaves = (query, key, value, scale, exponent)
    trains = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    tiles_of = None if lists is None else (lists.size, lists.rows, lists.lead)
    settings = Settings(kind, factor, causal, trains, tiles_of, **sizes)
    first = None if first_query is None else first_query.to(torch.int32).contiguous()
    known, packed = None, None
    if valid is not None:
        known = valid.to(torch.uint8).contiguous()
        if sweeps(lists):
            packed = packed_bits(known, blocks_of(query, key, lists, settings.sweep)[0].keys)
    listed = (None, None) if lists is None else (lists.index, lists.counts)
    if trains:
        output, tau, counts = _Attention.apply(*leaves, first, known, packed, *listed, settings)
        return output.transpose(1, 2), tau, counts  # a view that is made there could not be changed in place
    output, tau, counts, *_ = replayed(_forward, (*leaves, first, known, packed, *listed), settings)
    assert output is not None and tau is not None and counts is not None
    return output.transpose(1, 2), tau, counts


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor | None,
    exponent: Tensor | None,
    first: Tensor | None,
    valid: Tensor | None,
    packed: Tensor | None,
    index: Tensor | None,
    listed: Tensor | None,
    settings: Settings,
) -> tuple[Tensor | None, ...]:
    """Return the fields of `Attended`; those that only a backward reads may be None.

    Args:
        scale, exponent: see `Numbers`.
        first: `[B]` int32, position of the first query; None where the queries are the last positions.
        valid: `[B, Tk]` uint8, 0 for padding.
        packed: the same as bits, see `sweep.candidates`.
        index, listed: see `Lists`.
    """
    causal, lists = settings.causal, settings.lists(index, listed)
    numbers = Numbers(scale, settings.factor, exponent, settings.kind)
    found: Candidates | None = None
    few, buffered = settings.few or few_sizes(query), settings.buffered or buffered_sizes(query, key, lists)
    chunk, length = buffered.chunk, key.shape[2]
    most, kept = (pieces(min(limit, length), chunk) * chunk for limit in settings.limits(length))
    kept = min(kept, most)
    if sweeps(lists):
        kept = max(kept, few.keys)
        found = candidates(
            query, key, numbers, first, valid, packed, causal, settings.capacity, few.keys, kept,
            settings.sweep, settings.start, settings.near, settings.every, lists, settings.probe,
        )  # fmt: skip
    attended = attend_groups(
        query, key, value, numbers, first, valid, causal, lists, found, most, kept, settings.trains, few, buffered,
    )  # fmt: skip
    if settings.marks(query, key, lists):
        bound = None if found is None else found.bound
        attend_tiles(query, key, value, numbers, first, valid, causal, lists, bound, attended, settings.tiles)
    return tuple(attended)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor | None,
    exponent: Tensor | None,
    first: Tensor | None,
    valid: Tensor | None,
    index: Tensor | None,
    listed: Tensor | None,
    tau: Tensor,
    counts: Tensor,
    slopes: Tensor,
    support: Tensor,
    lengths: Tensor,
    settings: Settings,
    with_scale: bool,
    with_exponent: bool,
) -> tuple[Tensor | None, ...]:
    """Return the fields of `Gradients`; the arguments are those and results of `_forward`."""
    lists = settings.lists(index, listed)
    numbers = Numbers(scale, settings.factor, exponent, settings.kind)
    attended = Attended(query, tau, counts, slopes, support, lengths)  # the output is not needed
    found = gradients(
        query, key, value, numbers, first, valid, settings.causal, lists, attended, grad, with_scale, with_exponent,
        settings.marks(query, key, lists, backward=True), settings.tiles,
    )  # fmt: skip
    return tuple(found)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, tau and counts; the arguments are those of `_forward`."""
        *inputs, packed, index, listed, settings = arguments
        output, *rest = replayed(_forward, (*inputs, packed, index, listed), settings)
        ctx.save_for_backward(*inputs, index, listed, *rest)  # type: ignore[arg-type]
        ctx.settings = settings  # type: ignore[attr-defined]
        tau, counts = rest[:2]
        assert output is not None and tau is not None and counts is not None
        ctx.mark_non_differentiable(tau, counts)
        return output, tau, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]  # read once: checkpointing gives them away
        wants = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad = (grad if grad.stride(-1) == 1 else grad.contiguous()).transpose(1, 2)
        settings = ctx.settings  # type: ignore[attr-defined]
        d_query, d_key_value, d_scale, d_exponent = replayed(_backward, (grad, *saved), settings, wants[3], wants[4])
        assert d_key_value is not None
        d_key, d_value = d_key_value.to(saved[1].dtype)
        return (
            d_query if wants[0] else None,
            d_key if wants[1] else None,
            d_value if wants[2] else None,
            None if d_scale is None else d_scale.sum((0, 2)),
            None if d_exponent is None else d_exponent.sum((0, 2)),
            *(None,) * 6,
        )
