"""Compute the divergence of two distributions and its gradient in one kernel; `hf_sparse.ops.divergence` defines it.

A program owns one token. It goes over the logits twice: first for the logarithms of the two sums of exponentials, and
then, when they are still in the cache of the GPU, for

    divergence = sum_v p_v (log p_v - log q_v)        p of the teacher, q of the student
    gradient   = q_v - p_v                            of the student's logit v

in float32. The gradient is computed in the forward, which has read all that it takes, and kept in the student's dtype.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.triton.launch import launch

_COLUMNS, _WARPS = 4096, 8  # logits at a time, and warps, of a program


def fused_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum over tokens of KL(teacher || student), for logits `[N, V]` whose last dimension is contiguous."""
    return _Divergence.apply(student, teacher.detach())


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor) -> Tensor:
        rows, columns = student.shape
        wanted = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        gradient = torch.empty_like(student) if wanted else None
        sums = torch.empty(rows, dtype=torch.float32, device=student.device)
        launch(_divergence, (rows,))(
            student, teacher, gradient, sums, columns, student.stride(0), teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            BLOCK=min(_COLUMNS, triton.next_power_of_2(columns)), num_warps=_WARPS,
        )  # fmt: skip
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None


@triton.jit
def _sum_of(base, columns, BLOCK: tl.constexpr):
    """Return the logarithm of the sum of the exponentials of a row."""
    index = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + index
        x = tl.load(base + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        top = tl.maximum(peak, x)
        # Where all is -inf so far, the difference would be NaN.
        mass = tl.where(top == float("-inf"), 0.0, mass * tl.exp(peak - top) + tl.exp(x - top))
        peak = top
    top = tl.max(peak, 0)
    return top + tl.log(tl.sum(tl.where(peak == float("-inf"), 0.0, mass * tl.exp(peak - top)), 0))


@triton.jit(do_not_specialize=["columns"])
def _divergence(Student, Teacher, Gradient, Sums, columns, student_row, teacher_row, gradient_row, BLOCK: tl.constexpr):
    """Compute the divergence of one token, and its gradient where there is a tensor for it."""
    row = tl.program_id(0).to(tl.int64)
    Student += row * student_row
    Teacher += row * teacher_row
    of_student, of_teacher = _sum_of(Student, columns, BLOCK), _sum_of(Teacher, columns, BLOCK)
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + index
        inside = column < columns
        s = tl.load(Student + column, mask=inside, other=float("-inf")).to(tl.float32) - of_student
        t = tl.load(Teacher + column, mask=inside, other=float("-inf")).to(tl.float32) - of_teacher
        p = tl.exp(t)
        total += tl.where(inside, p * (t - s), 0.0)
        if Gradient is not None:
            gradient = tl.exp(s) - p
            tl.store(Gradient + row * gradient_row + column, gradient.to(Gradient.dtype.element_ty), mask=inside)
    tl.store(Sums + row, tl.sum(total, 0))
