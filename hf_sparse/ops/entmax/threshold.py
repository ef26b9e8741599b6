"""Solve for the threshold tau of entmax, without sorting and without bisection.

With z = (alpha - 1) s and e = 1 / (alpha - 1) >= 1, tau solves

    || [z - tau]_+ ||_e = 1

The norm is convex and decreasing in tau, so Newton's steps from the left never pass the root: every iterate, the first
included, is a lower bound of tau. The start is max(z) - 1. If all entries are equal one step arrives; usually three to
seven reach the precision of the dtype, and each at least quarters the product of residual and slope.

The norm form is ours; the bracket is that of Peters et al. 2019 (arXiv 1905.05702).
"""

import torch
from torch import Tensor

from hf_sparse.ops.triton import available

_STEPS = 100  # a guard: far more than the rate above needs for the digits of float64

# Steps that are taken without asking whether all rows have arrived: asking waits for the device.
_UNSEEN = {"cuda": 6}


def powers(excess: Tensor, exponent: float | Tensor) -> tuple[Tensor, Tensor]:
    """Compute `excess ** exponent` and `excess ** (exponent - 1)`, both 0 where `excess` is 0.

    Args:
        excess: non-negative.
        exponent: at least 1, a number or a tensor that broadcasts.
    """
    if isinstance(exponent, float) and exponent == 2.0:  # alpha = 1.5
        return excess.square(), excess
    if isinstance(exponent, float) and exponent == 1.0:  # alpha = 2
        return excess, (excess > 0).to(excess.dtype)
    power = excess.pow(exponent - 1).masked_fill_(excess == 0, 0.0)
    return power * excess, power


def relative_threshold(z: Tensor, exponent: float | Tensor) -> Tensor:
    """Solve for the thresholds of rows whose largest entry is 0.

    Args:
        z: `[..., S]` float32 or float64, the largest of each row 0, or all `-inf`.
        exponent: 1 / (alpha - 1), a number or a tensor that broadcasts with `[..., 1]`.

    Returns:
        `[..., 1]` tau in [-1, 0); -1 for a row of `-inf` alone.
    """
    tau = torch.full_like(z[..., :1], -1.0)
    tolerance = torch.finfo(z.dtype).eps
    unseen = _UNSEEN.get(z.device.type, 0)
    for number in range(_STEPS):
        excess = (z - tau).clamp_(min=0)
        weight, slope = powers(excess, exponent)
        mass = weight.sum(-1, keepdim=True)
        norm = mass.pow(1 / exponent)
        step = (norm - 1) * mass / (norm * slope.sum(-1, keepdim=True))
        step = step.masked_fill_(mass == 0, 0.0).clamp_(min=0)
        tau += step
        if number >= unseen and not (step > tolerance).any():
            break
    return tau


def distribution(z: Tensor, exponent: float | Tensor) -> Tensor:
    """Compute the probabilities of rows `[..., S]`; zeros for a row of `-inf` alone or of nothing. No gradient."""
    if z.numel() == 0:
        return torch.zeros_like(z)
    if z.device.type == "cuda" and z.dtype == torch.float32 and available(z.device):
        from hf_sparse.ops.entmax.triton.rows import distribution_of_rows  # Triton is there only beside a CUDA device

        return distribution_of_rows(z, exponent)
    z = z - z.amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    weight, _ = powers((z - relative_threshold(z, exponent)).clamp_(min=0), exponent)
    mass = weight.sum(-1, keepdim=True)
    return weight / mass.masked_fill(mass == 0, 1.0)
