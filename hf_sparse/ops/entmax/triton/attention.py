"""Attend with entmax on the GPU, as one differentiable function: over all keys, or over listed tiles of keys."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.entmax.triton.backward import gradients
from hf_sparse.ops.entmax.triton.common import kind_of, per_head
from hf_sparse.ops.entmax.triton.few import Few
from hf_sparse.ops.entmax.triton.groups import Attended, Buffered, attend_groups
from hf_sparse.ops.entmax.triton.jobs import Lists
from hf_sparse.ops.entmax.triton.sweep import EVERY, FIRST, Blocks, Candidates, candidates, takes_lists
from hf_sparse.ops.entmax.triton.tiles import attend_tiles

CAPACITY = 1024  # blocks of keys with a candidate that are kept for a group of queries
MOST = 16384  # candidates that are kept for a group, or half of all keys
KEPT = 4096  # keys of a group that may have weight when all products are known, or an eighth of all keys
# Texts of which all keys are kept, where no backward will read the lists: a group of heads that attend to most keys
# takes less time so than without buffers.
WHOLE = 8192


@dataclass(frozen=True)
class Plan:
    """Describe who attends to whom, and the sizes of the programs.

    Attributes:
        first: `[B]` int32, position of the first query; None where the queries are the last positions.
        valid: `[B, Tk]` uint8, 0 for padding.
        causal: whether a query sees the keys up to its position only.
        lists: tiles of keys; all keys by default.
        capacity, most, kept: blocks, candidates, and keys with or almost with weight that a group of queries may have.
        sweep, tiles: sizes of the programs; chosen by shape and dtype by default.
        near: keys of the beginning over which the first bound is taken.
        start: sizes of the kernel of the first bound.
        every: blocks of keys after which the bound rises.
        few, buffered: sizes of the kernels for groups with few candidates, and of those with buffers.
    """

    first: Tensor | None
    valid: Tensor | None
    causal: bool
    lists: Lists | None = None
    capacity: int = CAPACITY
    most: int | None = None
    kept: int | None = None
    sweep: Blocks | None = None
    tiles: Blocks | None = None
    near: int = FIRST
    start: Blocks | None = None
    every: int = EVERY
    few: tuple[Few, ...] | None = None
    buffered: tuple[Buffered, ...] | None = None


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
        sizes: fields of `Plan`, for tests.
    """
    heads, device = query.shape[1], query.device
    kind = kind_of(1.0 / (alpha - 1.0))
    scale = per_head(scaling * (alpha - 1), heads, device)
    exponent = None if kind else per_head(1 / (alpha - 1), heads, device)
    first = None if first_query is None else first_query.to(torch.int32).contiguous()
    known = None if valid is None else valid.to(torch.uint8).contiguous()
    plan = Plan(first, known, causal, lists, **sizes)
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    # Asked here: inside the function gradients are off, and its context does not know of `no_grad`.
    leaves = (query, key, value, scale, exponent)
    trains = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if not trains:
        return _forward(query, key, value, scale, exponent, kind, plan, trains)[:3]
    output, tau, counts = _Attention.apply(query, key, value, scale, exponent, kind, plan)
    return output, tau, counts


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    exponent: Tensor | None,
    kind: int,
    plan: Plan,
    trains: bool,
) -> Attended:
    first, valid, causal, lists = plan.first, plan.valid, plan.causal, plan.lists
    found: Candidates | None = None
    if lists is None or takes_lists(lists):
        found = candidates(
            query, key, scale, exponent, kind, first, valid, causal, plan.capacity, plan.sweep, plan.start, plan.near,
            plan.every, lists,
        )  # fmt: skip
    keys = key.shape[2]
    most = max(MOST, keys // 2) if plan.most is None else plan.most
    kept = plan.kept
    if kept is None:
        kept = keys if keys <= WHOLE and not trains else max(KEPT, keys // 8)
    attended = attend_groups(
        query,
        key,
        value,
        scale,
        exponent,
        kind,
        first,
        valid,
        causal,
        lists,
        found,
        most,
        kept,
        trains,
        plan.few,
        plan.buffered,
    )
    bound = None if found is None else found.bound
    attend_tiles(query, key, value, scale, exponent, kind, first, valid, causal, lists, bound, attended, plan.tiles)
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: Tensor,
        exponent: Tensor | None,
        kind: int,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended = _forward(query, key, value, scale, exponent, kind, plan, trains=True)
        saved = (attended.tau, attended.counts, attended.slopes, attended.support, attended.lengths)
        ctx.save_for_backward(query, key, value, scale, exponent, *saved)  # type: ignore[arg-type]
        ctx.kind, ctx.plan, ctx.room = kind, plan, attended.room  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(attended.tau, attended.counts)
        return attended.output, attended.tau, attended.counts

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, scale, exponent, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        plan: Plan = ctx.plan  # type: ignore[attr-defined]
        room: int = ctx.room  # type: ignore[attr-defined]
        wants = ctx.needs_input_grad  # type: ignore[attr-defined]
        tau, counts, slopes, support, lengths = saved
        attended = Attended(query, tau, counts, slopes, support, lengths, room)  # the output is not needed
        found = gradients(
            query, key, value, scale, exponent, ctx.kind,  # type: ignore[attr-defined]
            plan.first, plan.valid, plan.causal, plan.lists, attended,
            grad if grad.stride(-1) == 1 else grad.contiguous(), wants[3], wants[4], plan.tiles,
        )  # fmt: skip
        return (
            found.query if wants[0] else None,
            found.key.to(key.dtype) if wants[1] else None,
            found.value.to(value.dtype) if wants[2] else None,
            None if found.scale is None else found.scale.sum((0, 2)),
            None if found.exponent is None else found.exponent.sum((0, 2)),
            None,
            None,
        )
