"""Compute linear scores in kernels; `hf_sparse.ops.selection.linear_scores` defines them.

With `x` a row of the input, `m` its mean, `r` the inverse of its standard deviation and `w` the weight of a head,

    score = r * (sum(w x) - m sum(w))

so that one pass over the row is enough; its sums are in float64, where nothing cancels that matters. The backward
reads the input once more. With the gradients `g` of a row's scores `s`,

    d x_c  = r * (sum_h g_h (w_hc - mean(w_h)) - (x_c - m) r * sum_h g_h s_h / C)
    d w_hc = sum over rows of g_h (x_c - m) r

is in float32: it rounds to the dtypes of input and weight. Sums over rows are cut into as many parts as fill the GPU
and added up in order, so the gradient is the same in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.selection.linear_scores import Slopes
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, replayed

EPS = 1e-5  # epsilon of the layer norm
_ROWS, HEADS, COLUMNS = 4, 8, 64  # sizes of a program of the forward
_WARPS, STAGES = 2, 3
_STEP, _WIDTH = 16, 128  # rows of a step and columns of a program of the backward
_PROGRAMS = 2048  # about fifteen for each multiprocessor of a large GPU


def linear_scores(states: Tensor, weight: Tensor) -> Tensor:
    """Score `[B, T, C]` float32, bfloat16 or float16 states by weights `[Hkv, C]`: `[B, Hkv, T]` float64."""
    return _LinearScores.apply(states, weight)


def token_scores(states: Tensor, weight: Tensor, slope: Tensor | None, index: Tensor, slopes: Slopes) -> Tensor:
    """Score as `ops.selection.linear_scores.token_scores`, in one launch."""
    inputs = (states.contiguous(), weight.contiguous(), slope, index)
    (scores,) = replayed(_token_scores, inputs, slopes)
    assert scores is not None
    return scores


def _token_scores(
    states: Tensor, weight: Tensor, slope: Tensor | None, index: Tensor, slopes: Slopes
) -> tuple[Tensor | None, ...]:
    batch, length, _ = states.shape
    scores = empty((batch, weight.shape[0], length), torch.float32, states.device)
    if batch * length:
        write_scores(states, weight, slope, index, scores, slopes)
    return (scores,)


def write_scores(
    states: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    index: Tensor | None,
    scores: Tensor,
    slopes: Slopes,
) -> None:
    """Launch the kernel that scores tokens, see `token_scores`.

    Args:
        states, weight: contiguous.
        index: positions `[B, T]`; `None` for 0 to T - 1 in every row.
        scores: `[B, Hkv, room]` float32, contiguous, whose first `T` columns are written.
    """
    batch, length, columns = states.shape
    heads, rows = weight.shape[0], batch * length
    launch(_forward, (triton.cdiv(rows, _ROWS), triton.cdiv(heads, HEADS)))(
        states, weight, scores, None, None, None, slope, index, 0 if index is None else index.stride(0), rows, length,
        scores.shape[-1], heads, columns,
        EPS=EPS, ROWS=_ROWS, HEADS=min(HEADS, triton.next_power_of_2(heads)), COLUMNS=COLUMNS, STAGES=STAGES,
        SLOPED=True, SLOPE=slopes.position_slope, SLOPE_TOKENS=slopes.tokens, SLOPE_LENGTH=slopes.length,
        num_warps=_WARPS,
    )  # fmt: skip


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, states: Tensor, weight: Tensor) -> Tensor:
        scores, *statistics = replayed(_scores_and_statistics, (states.contiguous(), weight.contiguous()))
        saved: tuple[Any, ...] = (states, weight, scores, *statistics)
        ctx.save_for_backward(*saved)
        assert scores is not None
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight, *results = ctx.saved_tensors
        inputs = (grad.contiguous(), states.contiguous(), weight.contiguous(), *results)
        d_states, d_weight = replayed(_gradients, inputs, *ctx.needs_input_grad)
        return d_states, None if d_weight is None else d_weight.sum(0).to(weight.dtype)


def _scores_and_statistics(states: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Return scores, and what the backward needs: sums of the weights, means and inverse deviations of the rows."""
    batch, length, columns = states.shape
    heads, rows, device = weight.shape[0], batch * length, states.device
    scores, sums = empty((batch, heads, length), torch.float64, device), empty((heads,), torch.float64, device)
    means, scales = empty((rows,), torch.float64, device), empty((rows,), torch.float64, device)
    if rows:
        launch(_forward, (triton.cdiv(rows, _ROWS), triton.cdiv(heads, HEADS)))(
            states, weight, scores, sums, means, scales, None, None, 0, rows, length, length, heads, columns,
            EPS=EPS, ROWS=_ROWS, HEADS=min(HEADS, triton.next_power_of_2(heads)), COLUMNS=COLUMNS,
            STAGES=STAGES, SLOPED=False, SLOPE=0.0, SLOPE_TOKENS=1, SLOPE_LENGTH=0, num_warps=_WARPS,
        )  # fmt: skip
    return scores, sums, means, scales


def _gradients(
    grad: Tensor,
    states: Tensor,
    weight: Tensor,
    scores: Tensor,
    sums: Tensor,
    means: Tensor,
    scales: Tensor,
    of_states: bool,
    of_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of states and, in parts of rows that are still to be added up, of the weight."""
    batch, length, columns = states.shape
    heads, rows, device = weight.shape[0], batch * length, states.device
    blocks = triton.cdiv(columns, _WIDTH)
    steps = triton.cdiv(rows, _STEP)
    share = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // blocks)))  # steps of a program
    parts = triton.cdiv(steps, share) if steps else 0
    d_states = empty(states.shape, states.dtype, device) if of_states else None
    d_weight = empty((parts, heads, columns), torch.float32, device) if of_weight else None
    if rows:
        launch(_backward, (parts, blocks))(
            states, weight, grad, scores, sums, means, scales, d_states, d_weight,
            rows, length, heads, columns, share * _STEP,
            HEADS=max(16, triton.next_power_of_2(heads)), STEP=_STEP, WIDTH=_WIDTH,
            OF_STATES=of_states, OF_WEIGHT=of_weight, num_warps=4,
        )  # fmt: skip
    return d_states, d_weight


@triton.jit
def row_scores(
    states, weight, row, inside, head, there, columns, read,
    EPS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return scores `[ROWS, HEADS]` without slopes, sums of the weights, means and inverse deviations of the rows.

    Of the columns `read` are read: all, or 0 where no score is wanted."""
    total, squares = tl.zeros([ROWS, COLUMNS], tl.float64), tl.zeros([ROWS, COLUMNS], tl.float64)
    product, weights = tl.zeros([ROWS, HEADS, COLUMNS], tl.float64), tl.zeros([HEADS, COLUMNS], tl.float64)
    for begin in tl.range(0, read, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)
        known = column[None, :] < columns
        x = tl.load(states + row[:, None] * columns + column[None, :], mask=inside[:, None] & known, other=0.0)
        w = tl.load(weight + head[:, None] * columns + column[None, :], mask=there[:, None] & known, other=0.0)
        x, w = x.to(tl.float64), w.to(tl.float64)
        total += x
        squares += x * x
        weights += w
        product += x[:, None, :] * w[None, :, :]
    mean = tl.sum(total, 1) / columns
    variance = tl.maximum(tl.sum(squares, 1) / columns - mean * mean, 0.0)
    scale = 1 / tl.sqrt(variance + EPS)
    summed = tl.sum(weights, 1)
    return scale[:, None] * (tl.sum(product, 2) - mean[:, None] * summed[None, :]), summed, mean, scale


@triton.jit
def slope_positions(position, SLOPE_LENGTH: tl.constexpr):
    """Return what slopes are multiplied by, as `ops.selection.linear_scores.slope_positions`, in float64."""
    place = position.to(tl.float64)
    if SLOPE_LENGTH > 0:
        place = SLOPE_LENGTH * tl.log(1 + place / SLOPE_LENGTH)
    return place


@triton.jit
def head_slopes(Slope, head, there, SLOPE: tl.constexpr, SLOPE_TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Return what HEADS heads add to a score per token of `slope_positions`."""
    slope = tl.zeros([HEADS], tl.float64) + SLOPE
    if Slope is not None:
        slope += tl.load(Slope + head, mask=there, other=0.0).to(tl.float64) / SLOPE_TOKENS
    return slope


@triton.jit(do_not_specialize=["index_row", "rows", "length", "room"])
def _forward(
    states, weight, scores, sums, means, scales, Slope,
    Index, index_row, rows, length, room, heads, columns,
    EPS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    SLOPED: tl.constexpr, SLOPE: tl.constexpr, SLOPE_TOKENS: tl.constexpr, SLOPE_LENGTH: tl.constexpr,
):  # fmt: skip
    """Score ROWS rows by HEADS heads, with slopes if SLOPED; `sums`, `means` and `scales` are for a backward.

    The scores of a head have `room` columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside, there = row < rows, head < heads
    score, summed, mean, scale = row_scores(
        states, weight, row, inside, head, there, columns, columns, EPS, ROWS, HEADS, COLUMNS, STAGES
    )
    if SLOPED:
        place = row % length
        if Index is not None:
            place = tl.load(Index + row // length * index_row + place, mask=inside, other=0)
        risen = slope_positions(place, SLOPE_LENGTH)
        score += risen[:, None] * head_slopes(Slope, head, there, SLOPE, SLOPE_TOKENS, HEADS)[None, :]
    at = (row[:, None] // length * heads + head[None, :]) * room + row[:, None] % length
    tl.store(scores + at, score.to(scores.dtype.element_ty), mask=inside[:, None] & there[None, :])
    if sums is not None:
        if tl.program_id(0) == 0:
            tl.store(sums + head, summed, mask=there)
        if tl.program_id(1) == 0:
            tl.store(means + row, mean, mask=inside)
            tl.store(scales + row, scale, mask=inside)


@triton.jit(do_not_specialize=["rows", "length", "share"])
def _backward(
    states, weight, grads, scores, sums, means, scales, d_states, d_weight, rows, length, heads, columns, share,
    HEADS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, OF_STATES: tl.constexpr, OF_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Compute the gradients for `share` rows of `WIDTH` columns."""
    part = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there, known = head < heads, column < columns
    of_head = head[:, None] * columns + column[None, :]
    w = tl.load(weight + of_head, mask=there[:, None] & known[None, :], other=0.0).to(tl.float32)
    w -= (tl.load(sums + head, mask=there, other=0.0) / columns).to(tl.float32)[:, None]
    gathered = tl.zeros([HEADS, WIDTH], tl.float32)
    for begin in range(0, share, STEP):
        row = part * share + begin + tl.arange(0, STEP)
        inside = row < rows
        at = row[:, None] * columns + column[None, :]
        full = inside[:, None] & known[None, :]
        mean = tl.load(means + row, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(states + at, mask=full, other=0.0).to(tl.float32)
        x = tl.where(full, (x - mean[:, None]) * scale[:, None], 0.0)
        of_score = (row[:, None] // length * heads + head[None, :]) * length + row[:, None] % length
        real = inside[:, None] & there[None, :]
        g = tl.load(grads + of_score, mask=real, other=0.0).to(tl.float32)
        if OF_STATES:
            s = tl.load(scores + of_score, mask=real, other=0.0).to(tl.float32)
            along = tl.sum(g * s, 1) / columns
            d = (tl.dot(g, w, input_precision="ieee") - x * along[:, None]) * scale[:, None]
            tl.store(d_states + at, d.to(d_states.dtype.element_ty), mask=full)
        if OF_WEIGHT:
            gathered += tl.dot(tl.trans(g), x, input_precision="ieee")
    if OF_WEIGHT:
        tl.store(d_weight + part * heads * columns + of_head, gathered, mask=there[:, None] & known[None, :])
