"""SparseK attention by Triton kernels: which keys, and what autograd sees."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.selection import thresholds
from hf_sparse.ops.selection.bidirectional import shared_gates
from hf_sparse.ops.selection.triton import scan
from hf_sparse.ops.selection.triton.attention_backward import backward
from hf_sparse.ops.selection.triton.attention_forward import Blocks, forward
from hf_sparse.ops.selection.triton.lists import Tables, bidirectional_tables, causal_tables

# Queries that share a list. A program also looks at the keys that left the window since its tile began.
_TILE = 128
_OF_KEYS = ("begin", "until", "lists", "first", "scores", "ends")  # tensors of `Tables`


def causal_sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    k: int,
    window: int,
    sinks: int,
    scaling: float,
    soft: bool,
    support: int | None,
    start: Tensor | None,
    *,
    tile: int = _TILE,
    blocks: Blocks | None = None,
) -> Tensor:
    """See `sparsek_attention`, which checks the arguments. `tile` and `blocks` are for tests and benchmarks."""
    keys, queries = key.shape[2], query.shape[2]
    first = _first(key, start)
    fixed = None  # sinks and padding: no candidates
    if start is not None:
        fixed = torch.arange(keys, device=query.device) < first[:, None, None] + sinks
    elif sinks:
        fixed = torch.arange(keys, device=query.device) < sinks
    if soft:
        scores = _near_zero(scores, fixed, k)
    candidates = scores if fixed is None else scores.masked_fill(fixed, -torch.inf)
    size = keys if support is None else min(support, keys)
    search = scan.scan if scan.supports(candidates, size=size, queries=queries, tile=tile) else thresholds.scan
    found = search(
        candidates if soft else candidates.detach(),
        k,
        size=size,
        queries=queries,
        window=window,
        tile=tile,
        with_tau=soft,
        with_lists=True,
    )
    tau = None if found.tau is None else found.tau.to(scores.dtype)
    found = found._replace(tau=tau)
    tables = causal_tables(found, candidates.detach(), first, queries=queries, window=window, sinks=sinks, tile=tile)
    z = scores if soft else None
    if soft and fixed is not None:
        z = scores.masked_fill(fixed, torch.inf)  # the gate of a sink is 1, whatever tau is
    return attend(query, key, value, z, tau, tables, scaling, blocks)


def bidirectional_sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    k: int,
    window: int,
    sinks: int,
    scaling: float,
    soft: bool,
    support: int | None,
    start: Tensor | None,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """See `sparsek_attention`, which checks the arguments. `blocks` is for tests and benchmarks."""
    length = key.shape[2]
    first = _first(key, start)
    shared = shared_gates(scores if soft else scores.detach(), first, k, window, sinks, soft, support)
    reached = length if support is None else max(support, window + k)
    width = min(length, sinks + reached)  # a row that fits into the budget shares all of its tokens
    tables = bidirectional_tables(shared.detach(), first, window=window, width=width)
    return attend(query, key, value, shared if soft else None, None, tables, scaling, blocks)


def _near_zero(scores: Tensor, fixed: Tensor | None, k: int) -> Tensor:
    """Subtract from each row its k-th best candidate, which changes no gate.

    The kernels hold thresholds in float32: next to a large score they would be rounded.
    """
    candidates = scores.detach() if fixed is None else scores.detach().masked_fill(fixed, -torch.inf)
    origin = candidates.topk(min(k, scores.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
    return scores - origin.masked_fill(origin == -torch.inf, 0.0)


def _first(key: Tensor, start: Tensor | None) -> Tensor:
    return torch.zeros(key.shape[0], dtype=torch.int64, device=key.device) if start is None else start


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor | None,
    tau: Tensor | None,
    tables: Tables,
    scaling: float,
    blocks: Blocks | None = None,
) -> Tensor:
    """Attention `[B, Hq, Tq, D]` of every query to the keys of the tables; a query without a key gets 0.

    Args:
        query, key, value: as in `sparsek_attention`; float32, bfloat16 or float16, `D` at most 256.
        scores: `[B, Hkv, Tk]` float32, differentiable: the gate of a key is `clip(scores - tau, 0, 1)` outside the
            window and 1 inside. `None` makes every gate 1.
        tau: `[B, Hkv, Tq]` float32, differentiable and non-decreasing; `None` is 0.
        tables: who attends to whom.
        scaling: multiplies the logits.
        blocks: sizes of the programs, if not those of the dtype and head size.
    """
    return _Attention.apply(query, key, value, scores, tau, tables, scaling, blocks)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor | None,
        tau: Tensor | None,
        tables: Tables,
        scaling: float,
        blocks: Blocks | None,
    ) -> Tensor:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        scores, tau = (None if x is None else x.contiguous() for x in (scores, tau))
        output, lse = forward(query, key, value, scores, tau, tables, scaling, blocks)
        of_keys = tuple(getattr(tables, name) for name in _OF_KEYS)
        saved: tuple[Any, ...] = (query, key, value, scores, tau, output, lse, *of_keys)
        ctx.save_for_backward(*saved)
        ctx.tables = tables._replace(**dict.fromkeys(_OF_KEYS))  # type: ignore[attr-defined,arg-type]
        ctx.scaling, ctx.blocks = scaling, blocks  # type: ignore[attr-defined]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, scores, tau, output, lse, *of_keys = ctx.saved_tensors  # type: ignore[attr-defined]
        tables = ctx.tables._replace(**dict(zip(_OF_KEYS, of_keys, strict=True)))  # type: ignore[attr-defined]
        gradients = backward(
            grad,
            query,
            key,
            value,
            scores,
            tau,
            output,
            lse,
            tables,
            ctx.scaling,  # type: ignore[attr-defined]
            want=ctx.needs_input_grad[:5],  # type: ignore[attr-defined]
            deterministic=torch.are_deterministic_algorithms_enabled(),
            blocks=ctx.blocks,  # type: ignore[attr-defined]
        )
        return (*gradients, None, None, None)
