"""Run SparseK attention in Triton kernels: which keys, and what autograd sees."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.selection import thresholds
from hf_sparse.ops.selection.gates import shared_gates
from hf_sparse.ops.selection.heads import solve_by_heads
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.thresholds import ScanPlan
from hf_sparse.ops.selection.triton import scan
from hf_sparse.ops.selection.triton.attention_backward import backward
from hf_sparse.ops.selection.triton.attention_forward import forward
from hf_sparse.ops.selection.triton.lists import (
    NEVER_ENDS,
    Tables,
    bidirectional_tables,
    causal_tables,
    leavers,
    selection_tables,
)
from hf_sparse.ops.selection.triton.program_sizes import ProgramSizes
from hf_sparse.ops.triton.replay import replayed

# Queries that share a list. A program also looks at the keys that left the window since its tile began.
TILE = 128
# Tensors of `Tables`.
_OF_KEYS = ("begin", "until", "lists", "first", "scores", "ends", "leavers", "bounds")


class CausalSettings(NamedTuple):
    """Hold the settings of a causal call.

    Attributes:
        k, window, sinks, soft, scaling: see `Problem`.
        size: keys that a query may select; of the head that may select most.
        tile: queries that share a list.
        blocks: sizes of the programs; `None` for what suits dtype and head size.
    """

    k: int
    window: int
    sinks: int
    soft: bool
    scaling: float
    size: int
    tile: int
    blocks: ProgramSizes | None


def causal_sparsek_attention(problem: Problem, *, tile: int = TILE, blocks: ProgramSizes | None = None) -> Tensor:
    """Solve a causal problem in fused kernels; returns `[B, Hq, Tq, D]` as `sparsek_attention`.

    Args:
        problem: tensors and settings of the call.
        tile: queries that share a list, for tests and benchmarks.
        blocks: sizes of the programs, for tests and benchmarks; by default what suits dtype and head size.
    """
    keys, queries = problem.key.shape[2], problem.query.shape[2]
    size = keys if problem.support is None else min(problem.support, keys)
    settings = CausalSettings(
        problem.k, problem.window, problem.sinks, problem.soft, problem.scaling, size, tile, blocks
    )
    if not scan.supports(problem.scores, size=size, queries=queries, tile=tile):
        if problem.of_heads is None:
            return _by_the_plain_scan(problem, settings)
        return solve_by_heads(lambda part: causal_sparsek_attention(part, tile=tile, blocks=blocks), problem)
    query, key, value = (_with_whole_rows(x) for x in (problem.query, problem.key, problem.value))
    counts = None if problem.of_heads is None else counts_on(key.device, problem.of_heads)
    inputs = (query, key, value, problem.trained_scores.contiguous(), problem.start, counts)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:4]):
        return _CausalAttention.apply(*inputs, settings)
    (output,) = replayed(_causal_forward, inputs, settings, False)
    assert output is not None
    return output


# A recorded graph reads them for as long as it lives, so none is dropped.
_counts: dict[tuple[torch.device, tuple[tuple[int, int | None], ...]], Tensor] = {}


def counts_on(device: torch.device, of_heads: tuple[tuple[int, int | None], ...]) -> Tensor:
    """Return `k` and `size` of each KV head as `scan.launch_scan` reads them, `[2, Hkv]` int32.

    A layer asks for the same numbers in every call, and to copy them to a device would take longer than to look for
    them. Without a support a size has no bound but the number of keys.
    """
    table = _counts.get((device, of_heads))
    if table is None:
        rows = [[k for k, _ in of_heads], [NEVER_ENDS if support is None else support for _, support in of_heads]]
        with torch.inference_mode(False):
            table = _counts[device, of_heads] = torch.tensor(rows, dtype=torch.int32, device=device)
    return table


def _by_the_plain_scan(problem: Problem, settings: CausalSettings) -> Tensor:
    """Solve a causal problem with the selection of plain PyTorch, which takes lists of any length."""
    keys, soft, sinks = problem.key.shape[2], problem.soft, problem.sinks
    fixed = torch.arange(keys, device=problem.key.device) < problem.first[:, None, None] + sinks  # no candidates
    scores = _near_zero(problem.scores, fixed, problem.k) if soft else problem.scores.detach()
    candidates = scores.masked_fill(fixed, -torch.inf)
    result = thresholds.scan_prefixes(
        candidates,
        problem.k,
        size=settings.size,
        queries=problem.query.shape[2],
        window=problem.window,
        tile=settings.tile,
        with_tau=soft,
        with_lists=True,
    )
    tau = None if result.tau is None else result.tau.to(scores.dtype)
    tables, _ = causal_tables(
        result.rank.contiguous(),
        result.floor.contiguous(),
        None if tau is None else tau.detach().contiguous(),
        result.lists.contiguous(),
        candidates.detach().contiguous(),
        None,
        problem.first,
        window=problem.window,
        sinks=sinks,
        tile=settings.tile,
    )
    z = scores.masked_fill(fixed, torch.inf) if soft else None  # the gate of a sink is 1, whatever tau is
    query, key, value = problem.query, problem.key, problem.value
    return attend_listed(query, key, value, z, tau, tables, problem.scaling, settings.blocks)


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


def _near_zero(scores: Tensor, fixed: Tensor, k: int) -> Tensor:
    """Subtract from each row its k-th best candidate, which changes no gate.

    The kernels hold thresholds in float32: next to a large score they would be rounded.
    """
    candidates = scores.detach().masked_fill(fixed, -torch.inf)
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
    if tables.begin is None and tables.leavers is None:
        tables = tables._replace(leavers=leavers(tables, query.shape[2], tables.tile))
    return _Attention.apply(query, key, value, scores, tau, tables, scaling, blocks)


class _CausalAttention(torch.autograd.Function):
    """Select keys and attend to them; the gradient of the scores goes through the gates and through tau."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        start: Tensor | None,
        counts: Tensor | None,
        settings: CausalSettings,
    ) -> Tensor:
        output, *rest = replayed(_causal_forward, (query, key, value, scores, start, counts), settings, True)
        saved: tuple[Any, ...] = (query, key, value, start, output, *rest)
        ctx.save_for_backward(*saved)
        ctx.settings = settings  # type: ignore[attr-defined]
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        want = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        saved = ctx.saved_tensors  # type: ignore[attr-defined]  # read once: checkpointing gives them away
        inputs: tuple[Any, ...] = (_with_whole_rows(grad), *saved)
        settings = ctx.settings  # type: ignore[attr-defined]
        if torch.are_deterministic_algorithms_enabled():  # sorts keys, and so cannot run again by its launches alone
            run: Any = _causal_backward
            gradients = run(*inputs, settings, want, True)
        else:
            gradients = replayed(_causal_backward, inputs, settings, want, False)
        return (*_as_inputs(gradients, saved), None, None, None)


def _causal_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    start: Tensor | None,
    counts: Tensor | None,
    settings: CausalSettings,
    wanted: bool,
) -> tuple[Tensor | None, ...]:
    """Return the output and, if a gradient is wanted, what the backward needs besides the inputs."""
    k, window, sinks, soft, scaling, size, tile, blocks = settings
    plan = ScanPlan(k, size, query.shape[2], window, tile, soft, True)
    z = tau = rank = floor = None
    if soft:
        rank, floor, tau, lists, origin = scan.launch_scan(scores, plan, start, sinks, shift=True, counts=counts)
        tables, z = causal_tables(rank, floor, tau, lists, scores, origin, start, window=window, sinks=sinks, tile=tile)
    else:
        selection = scan.launch_selection(scores, plan, start, sinks, counts)
        tables = selection_tables(selection, query.shape[2], start, window=window, sinks=sinks, tile=tile)
    output, lse = forward(query, key, value, z, tau, tables, scaling, blocks)
    if not wanted:
        return (output,)
    of_tau = (z, tau, tables.scores, tables.ends, rank, floor)
    return (output, lse, tables.until, tables.lists, tables.leavers, tables.bounds, *of_tau)


def _causal_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    output: Tensor,
    lse: Tensor,
    until: Tensor,
    lists: Tensor,
    of_tiles: Tensor,
    bounds: Tensor | None,
    z: Tensor | None,
    tau: Tensor | None,
    of_lists: Tensor | None,
    ends: Tensor | None,
    rank: Tensor | None,
    floor: Tensor | None,
    settings: CausalSettings,
    want: tuple[bool, bool, bool, bool],
    deterministic: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and scores that are wanted, those of key and value in any dtype."""
    window, sinks = settings.window, settings.sinks
    tables = Tables(None, until, lists, settings.tile, window - 1, 0, sinks, start, of_lists, ends, of_tiles, bounds)
    of_scores = want[3] and z is not None
    gradients = backward(
        grad,
        query,
        key,
        value,
        z,
        tau,
        output,
        lse,
        tables,
        settings.scaling,
        want=(*want[:3], of_scores, of_scores),
        deterministic=deterministic,
        blocks=settings.blocks,
    )
    if of_scores:
        assert z is not None and tau is not None and rank is not None and floor is not None
        assert gradients.tau is not None and gradients.scores is not None
        arrival = window - (key.shape[2] - query.shape[2])
        scan.launch_backward(z, rank, floor, tau, gradients.tau, arrival, gradients.scores)
    return gradients[:4]


def _with_whole_rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _as_inputs(gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return gradients of query, key, value and scores, those of key and value in the dtype of these."""
    d_query, d_key, d_value, d_scores = gradients
    d_key, d_value = (
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in ((d_key, inputs[1]), (d_value, inputs[2]))
    )
    return d_query, d_key, d_value, d_scores


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
        query, key, value = (_with_whole_rows(x) for x in (query, key, value))
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
            _with_whole_rows(grad),
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
        d_tau = None if gradients.tau is None else gradients.tau.sum(-1)
        return (*_as_inputs(gradients[:4], (query, key, value)), d_tau, None, None, None)
