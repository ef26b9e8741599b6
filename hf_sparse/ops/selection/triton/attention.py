"""Run SparseK attention in Triton kernels: which keys, and what autograd sees."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.selection import thresholds
from hf_sparse.ops.selection.gates import shared_gates
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.triton import scan
from hf_sparse.ops.selection.triton.attention_backward import backward
from hf_sparse.ops.selection.triton.attention_forward import ProgramSizes, forward
from hf_sparse.ops.selection.triton.lists import Tables, bidirectional_tables, causal_tables

# Queries that share a list. A program also looks at the keys that left the window since its tile began.
_TILE = 128
_OF_KEYS = ("begin", "until", "lists", "first", "scores", "ends")  # tensors of `Tables`


def causal_sparsek_attention(problem: Problem, *, tile: int = _TILE, blocks: ProgramSizes | None = None) -> Tensor:
    """Solve a causal problem in fused kernels; returns `[B, Hq, Tq, D]` as `sparsek_attention`.

    Args:
        problem: tensors and settings of the call.
        tile: queries that share a list, for tests and benchmarks.
        blocks: sizes of the programs, for tests and benchmarks; by default what suits dtype and head size.
    """
    query, k, window, sinks, soft = problem.query, problem.k, problem.window, problem.sinks, problem.soft
    keys, queries = problem.key.shape[2], query.shape[2]
    first, scores = problem.first, problem.scores
    fixed = None  # sinks and padding: no candidates
    if problem.start is not None:
        fixed = torch.arange(keys, device=query.device) < first[:, None, None] + sinks
    elif sinks:
        fixed = torch.arange(keys, device=query.device) < sinks
    if soft:
        scores = _near_zero(scores, fixed, k)
    candidates = scores if fixed is None else scores.masked_fill(fixed, -torch.inf)
    size = keys if problem.support is None else min(problem.support, keys)
    search = (
        scan.scan_prefixes
        if scan.supports(candidates, size=size, queries=queries, tile=tile)
        else thresholds.scan_prefixes
    )
    result = search(
        candidates if soft else candidates.detach(),
        k,
        size=size,
        queries=queries,
        window=window,
        tile=tile,
        with_tau=soft,
        with_lists=True,
    )
    tau = None if result.tau is None else result.tau.to(scores.dtype)
    result = result._replace(tau=tau)
    tables = causal_tables(result, candidates.detach(), first, queries=queries, window=window, sinks=sinks, tile=tile)
    z = scores if soft else None
    if soft and fixed is not None:
        z = scores.masked_fill(fixed, torch.inf)  # the gate of a sink is 1, whatever tau is
    return attend_listed(query, problem.key, problem.value, z, tau, tables, problem.scaling, blocks)


def bidirectional_sparsek_attention(problem: Problem, *, blocks: ProgramSizes | None = None) -> Tensor:
    """Solve the problem of an encoder in fused kernels; returns `[B, Hq, T, D]` as `sparsek_attention`.

    Args:
        problem: tensors and settings of the call.
        blocks: sizes of the programs, for tests and benchmarks; by default what suits dtype and head size.
    """
    length, window, support = problem.key.shape[2], problem.window, problem.support
    shared = shared_gates(problem)
    reached = length if support is None else max(support, window + problem.k)
    width = min(length, problem.sinks + reached)  # a row that fits into the budget shares all of its tokens
    tables = bidirectional_tables(shared.detach(), problem.first, window=window, width=width)
    gates = shared if problem.soft else None
    return attend_listed(problem.query, problem.key, problem.value, gates, None, tables, problem.scaling, blocks)


def _near_zero(scores: Tensor, fixed: Tensor | None, k: int) -> Tensor:
    """Subtract from each row its k-th best candidate, which changes no gate.

    The kernels hold thresholds in float32: next to a large score they would be rounded.
    """
    candidates = scores.detach() if fixed is None else scores.detach().masked_fill(fixed, -torch.inf)
    origin = candidates.topk(min(k, scores.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
    return scores - origin.masked_fill(origin == -torch.inf, 0.0)


def attend_listed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor | None,
    tau: Tensor | None,
    tables: Tables,
    scaling: float,
    blocks: ProgramSizes | None = None,
) -> Tensor:
    """Attend to the keys of the tables, `[B, Hq, Tq, D]`; a query without a key gets 0.

    Args:
        query, key, value: as in `sparsek_attention`; float32, bfloat16 or float16, `D` at most 256.
        scores: `[B, Hkv, Tk]` float32, differentiable: the gate of a key is `clip(scores - tau, 0, 1)` outside the
            window and 1 inside. `None` makes every gate 1.
        tau: `[B, Hkv, Tq]` float32, differentiable and non-decreasing; `None` is 0.
        tables: the keys that each query attends to.
        scaling: multiplies the logits.
        blocks: sizes of the programs; by default what suits dtype and head size.
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
        blocks: ProgramSizes | None,
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
