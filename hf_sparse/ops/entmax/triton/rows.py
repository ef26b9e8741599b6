"""Compute entmax of rows of logits that lie in memory, each by a program that finds its threshold.

Plain PyTorch takes more than ten launches for each step of Newton's method.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.entmax.triton.common import CLOSE, STEPS, kind_of, newton_step, powers
from hf_sparse.ops.triton.sizes import padded

_WIDE = 2048  # entries that a program holds at once


def distribution_of_rows(z: Tensor, exponent: float | Tensor) -> Tensor:
    """Return the probabilities of rows `[..., S]` float32, see `hf_sparse.ops.entmax.threshold.distribution`.

    Args:
        z: of any shape, float32.
        exponent: 1 / (alpha - 1), a number or a tensor that broadcasts with `[..., 1]`.
    """
    rows = z.contiguous()
    probabilities = torch.empty_like(rows)
    if not rows.numel():
        return probabilities
    kind = kind_of(exponent)
    exponents = None
    if not kind:
        exponents = torch.as_tensor(exponent, dtype=torch.float32, device=z.device)
        exponents = exponents.expand(*z.shape[:-1], 1).contiguous()
    length = rows.shape[-1]
    with torch.cuda.device_of(z):  # where Triton launches
        _distribution[(rows.numel() // length,)](
            rows, exponents, probabilities, length, KIND=kind, N=min(_WIDE, padded(length)), num_warps=4
        )
    return probabilities


@triton.jit(do_not_specialize=["length"])
def _distribution(Z, Exponent, Out, length, KIND: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    Z += row * length
    Out += row * length
    exponent = tl.load(Exponent + row) if KIND == 0 else (row * 0 + KIND).to(tl.float32)
    step = tl.arange(0, N)
    peaks = tl.full([N], float("-inf"), tl.float32)
    for begin in range(0, length, N):
        peaks = tl.maximum(peaks, tl.load(Z + begin + step, mask=begin + step < length, other=float("-inf")))
    peak = tl.max(peaks, 0)
    some = peak > float("-inf")
    peak = tl.where(some, peak, 0.0)  # taken off before anything else: the digits are needed around the threshold
    tau = peak * 0 - 1
    rises, steps = some.to(tl.int32), 0
    while (rises > 0) & (steps < STEPS):
        mass, slope = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
        for begin in range(0, length, N):
            z = tl.load(Z + begin + step, mask=begin + step < length, other=float("-inf")) - peak
            weight, gradient = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
            mass += weight
            slope += gradient
        rise = newton_step(tl.sum(mass, 0), tl.sum(slope, 0), exponent, KIND)
        tau += rise
        rises = (rise > CLOSE * (1 + tl.abs(tau))).to(tl.int32)
        steps += 1
    mass = tl.zeros([N], tl.float32)
    for begin in range(0, length, N):
        z = tl.load(Z + begin + step, mask=begin + step < length, other=float("-inf")) - peak
        weight, gradient = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
        mass += weight
    total = tl.sum(mass, 0)
    total = tl.where(some, total, 1.0)
    for begin in range(0, length, N):
        z = tl.load(Z + begin + step, mask=begin + step < length, other=float("-inf")) - peak
        weight, gradient = powers(tl.maximum(z - tau, 0.0), exponent, KIND)
        tl.store(Out + begin + step, weight / total, mask=begin + step < length)
