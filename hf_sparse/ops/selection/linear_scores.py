"""Compute scores that are linear in the layer-normalised input of an attention module.

All of it is computed in float64. In the first layer every occurrence of a token has the same input, so equal scores
are the rule there; sums in float32 get other last bits in another order, and prefill and decoding would break the ties
differently.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.triton import DTYPES, installed

_TRITON = installed()


class Slopes(NamedTuple):
    """Hold how scores rise with the position of a token, besides what each head has learned.

    Attributes:
        position_slope: number that all heads add per token of position.
        tokens: learned slopes are what a head adds per so many tokens of position.
        length: of `slope_positions`.
    """

    position_slope: float
    tokens: int
    length: int


def normalised(states: Tensor) -> Tensor:
    """Normalise `[..., C]` by a layer norm without parameters (eps 1e-5), in float64, or float32 on MPS."""
    exact = states.float() if states.device.type == "mps" else states.double()
    return F.layer_norm(exact, exact.shape[-1:])


def linear_scores(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply the normalised states by a weight per feature and KV head.

    Args:
        states: `[B, T, C]`, of any floating dtype.
        weight: `[Hkv, C]`, of any floating dtype.

    Returns:
        `[B, Hkv, T]` in the dtype of `normalised`.
    """
    if has_kernels(states):
        from hf_sparse.ops.selection.triton import linear_scores

        with torch.cuda.device_of(states):  # where Triton launches
            return linear_scores.linear_scores(states, weight)
    normal = normalised(states)
    weight = weight.to(normal.dtype)
    if states.shape[1] == 1:  # torch.compile fuses this with its neighbours in a decoding step
        return (normal * weight).sum(-1)[..., None]
    return (normal @ weight.T).transpose(1, 2)


def slope_positions(index: Tensor, length: int) -> Tensor:
    """Return what slopes are multiplied by at the positions `index`, any shape, float64, or float32 on MPS.

    The position itself where `length` is 0. Otherwise `length * log(1 + position / length)`, which is about the same
    near the beginning of a text, and far from it rises as much for each doubling of the position. The order of two
    scores never changes afterwards, so a key that fell out never returns.
    """
    place = index.float() if index.device.type == "mps" else index.double()
    return length * (1 + place / length).log() if length else place


def token_scores(states: Tensor, weight: Tensor, slope: Tensor | None, index: Tensor, slopes: Slopes) -> Tensor:
    """Score tokens by kernels, without a gradient: `linear_scores`, and slopes over the positions of the tokens.

    Args:
        states, weight: of `linear_scores`, for which `has_kernels` holds.
        slope: `[Hkv]`, what each head adds per `slopes.tokens` tokens of position, or `None`.
        index: `[B, T]` int64, the positions; its last dimension is contiguous.
        slopes: see `Slopes`.

    Returns:
        `[B, Hkv, T]` float32, contiguous, rounded once.
    """
    from hf_sparse.ops.selection.triton import linear_scores

    with torch.cuda.device_of(states):  # where Triton launches
        return linear_scores.token_scores(states, weight, slope, index, slopes)


def has_kernels(states: Tensor) -> bool:
    """Tell whether `linear_scores` of these states runs as kernels, which keep no copy of them for the backward."""
    return _TRITON and states.is_cuda and states.dtype in DTYPES and not torch.compiler.is_compiling()
