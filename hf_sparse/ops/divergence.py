"""Compute the divergence of one categorical distribution from another, from logits of many tokens over a vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.triton import DTYPES, available


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student), summed over tokens, a float32 scalar (float64 for float64 logits).

    Each logit is read, and each number computed, in float32 at least. On a GPU with Triton one kernel reads the logits
    and writes the gradient; elsewhere PyTorch makes several tensors of their size.

    Args:
        student: `[N, V]` logits; they may have a gradient.
        teacher: `[N, V]` logits, which get none.
    """
    if _has_kernel(student, teacher):
        from hf_sparse.ops.triton.divergence import fused_divergence

        with torch.cuda.device_of(student):  # where Triton launches
            return fused_divergence(student, teacher)
    dtype = torch.promote_types(student.dtype, torch.float32)
    target = teacher.detach().to(dtype).log_softmax(-1)
    return F.kl_div(student.to(dtype).log_softmax(-1), target, log_target=True, reduction="sum")


def _has_kernel(student: Tensor, teacher: Tensor) -> bool:
    """Tell whether the kernel takes these logits: device, dtypes and layout."""
    fits = student.shape == teacher.shape and student.ndim == 2 and student.dtype in DTYPES and teacher.dtype in DTYPES
    rows = student.is_cuda and student.numel() > 0 and student.stride(-1) == 1 and teacher.stride(-1) == 1
    return fits and rows and available(student.device)
