"""Attend by SparseK: one function, several implementations.

Query t attends, in one softmax, to

    the sinks            the first `sinks` keys
    the window           the last `window` keys, its own included
    the selected         the `k` best-scored keys that are neither

so that up to `k + window + sinks` positions it is dense attention. A key enters the competition when it leaves the
window; scores do not depend on queries and are frozen, so a key that loses its place never returns and removing it
from the input changes nothing. That is why one function serves training, prefill, chunked prefill and decoding: the
queries are the last `Tq` of `Tk` positions, and evicted keys are simply not there.

An encoder (`causal=False`) has every token at once, so the window reaches to both sides and the `k` best-scored keys
of the whole row that are no sinks are selected, one set per KV head for all queries. A selected key may stand in the
window of some query, and counts once there. A row of at most `k + window + sinks` tokens is dense attention here too.

Lou et al. 2024 (arXiv 2406.16747) for the causal case. The bidirectional one, and soft gates inside the softmax (see
`gates`), are ours.
"""

from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.selection.bidirectional import bidirectional_sparsek_attention
from hf_sparse.ops.selection.causal import causal_sparsek_attention
from hf_sparse.ops.selection.heads import Counts, numbers_per_head, solve_by_heads
from hf_sparse.ops.selection.problem import Problem, check_budget, check_inputs
from hf_sparse.ops.selection.reference import dense_sparsek_attention
from hf_sparse.ops.triton import DTYPES, MOST_ROWS, available

Gates = Literal["hard", "soft"]
Implementation = Literal["auto", "triton", "tiled", "dense"]


def sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    *,
    k: Counts,
    window: int,
    sinks: int,
    scaling: float | None = None,
    gates: Gates = "hard",
    support: Counts | None = None,
    start: Tensor | None = None,
    causal: bool = True,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attend to sinks, window and the `k` best-scored other keys.

    Args:
        query: `[B, Hq, Tq, D]`; the queries stand at the last `Tq` of the `Tk` positions.
        key, value: `[B, Hkv, Tk, D]` with `Hq` a multiple of `Hkv`, `Tq <= Tk`.
        scores: `[B, Hkv, Tk]` float32 or float64, one frozen score per key; of equal scores the lower index wins.
        k: selected keys per query, at least 1; without causal order 0 is possible too, and leaves window and sinks.
            A sequence has a number for each KV head.
        window: most recent keys that are always attended, at least 1. Without causal order those from
            `t - window // 2` to `t - window // 2 + window - 1`.
        sinks: first keys that are always attended, at least 0.
        scaling: multiplies the logits; `D ** -0.5` by default.
        gates: `"hard"` attends to exactly `k` selected keys (inference). `"soft"` (training) attends to the whole
            support of SparseK and multiplies the softmax weight of key j by its gate `clip(z_j - tau_t, 0, 1)`;
            window and sinks have gate 1. The gradient reaches the scores through the gates.
        support: with soft gates, project onto the best `support` scores only (at least `k`), which keeps the cost
            linear while score scales are small; `None` is exact SparseK. A sequence has a number for each KV head.
        start: `[B]` int64, index of the first key of each row; earlier ones are padding, never attended, whatever they
            hold (even NaN). The output of padded queries is finite and meaningless.
        causal: whether a query sees the keys up to its own position, or all keys of its row (then `Tq = Tk`).
        implementation: `"dense"` builds `Tq x Tk` masks and is the reference; `"tiled"` gathers the keys of a tile of
            queries and is linear in `Tq`; `"triton"` does so in fused kernels, on a CUDA device, for half precision
            and float32 (scores in float32), `D` up to 256 and `B * Hkv` up to 65,535. `"auto"` is `"triton"` where
            that runs and `"tiled"` elsewhere, or torch's own dense attention where the budget covers the whole sequence
            (the gradient of the scores is 0 there).

    Returns:
        `[B, Hq, Tq, D]` in the dtype of `query`, or autocast's where that is on. Softmax and gates are computed in
        float32 (float64 for float64). The kernels add up the gradients of key, value and scores in no fixed order,
        unless `torch.use_deterministic_algorithms` asks for one.

    Raises:
        ValueError: shapes that do not fit, `k`, `window`, `sinks` or `support` out of range, an unknown `gates` or
            `implementation`, or `"triton"` where it does not run.
    """
    for name, choice, known in (("gates", gates, Gates), ("implementation", implementation, Implementation)):
        if choice not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {choice!r}")
    check_inputs(query, key, value, scores, start, causal)
    k, support, of_heads = numbers_per_head(k, support, key.shape[1])
    for of_head in of_heads or [(k, support)]:
        check_budget(*of_head, window, sinks, causal)
    if query.numel() == 0:
        return query.clone()
    # A larger window or more sinks change nothing; tiles would gather them, and positions are int32 in the kernels.
    keys = key.shape[2]
    window, sinks = min(window, keys if causal else 2 * keys), min(sinks, keys)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    soft = gates == "soft" and k > 0
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for torch's own attention
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if start is not None:
        key, value, scores = (_zero_padding(tensor, start) for tensor in (key, value, scores))
        query = _zero_padding(query, start - (key.shape[2] - query.shape[2]))
    if not soft and of_heads is not None:
        of_heads = tuple([(count, count) for count, _ in of_heads])
    problem = Problem(
        query, key, value, scores, k, window, sinks, scaling, soft, support if soft else k, start, causal, of_heads
    )
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if implementation == "auto" and keys <= problem.least_k + window + sinks:
            output = _all_keys(problem)
            return _Unmoved.apply(output, scores) if soft and scores.requires_grad else output
        if implementation == "dense":
            return solve_by_heads(dense_sparsek_attention, problem)
        if _takes_kernels(implementation, query, scores):
            return _fused(problem)
        return solve_by_heads(causal_sparsek_attention if causal else bidirectional_sparsek_attention, problem)


class _Unmoved(torch.autograd.Function):
    """Return an output that no score can move as it is; the gradient of the scores is 0."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, scores: Tensor) -> Tensor:
        ctx.scores = scores.new_zeros(()).expand_as(scores)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.scores, memory_format=torch.contiguous_format)


def _fused(problem: Problem) -> Tensor:
    """Solve a problem by the Triton kernels, which are compiled side by side first."""
    # Triton is there only beside a CUDA device.
    from hf_sparse.ops.selection.triton import attention as kernels
    from hf_sparse.ops.selection.triton.scan import list_class
    from hf_sparse.ops.triton.launch import compile_ahead

    kernel = kernels.causal_sparsek_attention if problem.causal else kernels.bidirectional_sparsek_attention

    def solve(problem: Problem) -> Tensor:
        return kernel(problem) if problem.causal else solve_by_heads(kernel, problem)

    def attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, start: Tensor | None) -> Tensor:
        return solve(problem._replace(query=query, key=key, value=value, scores=scores, start=start))

    tensors = (problem.query, problem.key, problem.value, problem.scores, problem.start)
    keys = problem.key.shape[2]
    listed = list_class(keys if problem.support is None else min(problem.support, keys))
    with torch.cuda.device_of(problem.query):  # where Triton launches
        compile_ahead(attention, *tensors, family=(kernel, problem.soft, problem.of_heads is None, listed))
        return solve(problem)


def _takes_kernels(implementation: Implementation, query: Tensor, scores: Tensor) -> bool:
    """Tell whether the Triton kernels are to be used; raises `ValueError` where they were asked for and cannot run."""
    runs = available(query.device)
    rows = scores.shape[0] * scores.shape[1]
    fits = query.dtype in DTYPES and scores.dtype == torch.float32 and query.shape[-1] <= 256
    fits = fits and rows <= MOST_ROWS
    if implementation != "triton":
        return implementation == "auto" and runs and fits and query.device.type == "cuda"
    if not runs:
        raise ValueError(f"implementation 'triton' needs Triton and a CUDA device, got {query.device.type}")
    if not fits:
        raise ValueError(
            "implementation 'triton' needs query in float32, bfloat16 or float16, scores in float32, D of at most 256 "
            f"and B * Hkv of at most {MOST_ROWS}, got {query.dtype}, {scores.dtype}, {query.shape[-1]} and {rows}"
        )
    return True


def _zero_padding(tensor: Tensor, start: Tensor) -> Tensor:
    """Put zeros in place of padding `[B, H, T, ...]`: a weight of 0 times NaN would be NaN."""
    padding = torch.arange(tensor.shape[2], device=tensor.device) < start[:, None, None]
    return tensor.masked_fill(padding if tensor.ndim == 3 else padding[..., None], 0.0)


def _all_keys(problem: Problem) -> Tensor:
    """Attend to all keys, by the kernel that the base model itself would use."""
    query, key, start, causal = problem.query, problem.key, problem.start, problem.causal
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if start is not None or (causal and 1 < queries < keys):
        index = torch.arange(keys, device=query.device)
        mask = index <= index[keys - queries :, None] if causal else None
    if start is not None:
        # A padded query sees itself, or the last key: its output is never used, but it must not be NaN.
        exists = index >= start.clamp(max=keys - 1)[:, None, None, None]
        mask = exists if mask is None else mask & (exists | (index == index[keys - queries :, None]))
    grouped = query.shape[1] != key.shape[1]
    in_order = causal and mask is None and queries > 1
    return F.scaled_dot_product_attention(
        query, key, problem.value, mask, is_causal=in_order, scale=problem.scaling, enable_gqa=grouped
    )
