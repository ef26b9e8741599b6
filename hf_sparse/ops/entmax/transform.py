"""Compute alpha-entmax of a row of logits, as the `entmax` package does, and zeros where every logit is `-inf`.

    entmax(s) = argmax_p  <p, s> + H_alpha(p)   over distributions p,   H_alpha the Tsallis entropy
              = [(alpha - 1) s - tau]_+ ^ (1 / (alpha - 1))             tau such that it sums to 1

Softmax is the limit alpha -> 1; alpha = 2 is sparsemax. Peters et al. 2019 (arXiv 1905.05702); the gradient in alpha is
that of Correia et al. 2019 (arXiv 1909.00015).
"""

import torch
from entmax import entmax15, entmax_bisect, sparsemax
from torch import Tensor


def entmax(logits: Tensor, alpha: float | Tensor, dim: int = -1) -> Tensor:
    """Compute sparse probabilities: the reference that entmax attention is tested against.

    Args:
        logits: any shape, any float dtype. `-inf` marks entries that cannot be chosen; they get 0.
        alpha: in (1, 2], a number or a tensor that broadcasts with `logits` and is 1 long in `dim`. Differentiable.
        dim: the dimension that is normalised.

    Returns:
        Probabilities of the shape and dtype of `logits`; computed in float32, or float64 for float64 input. A row of
        `-inf` alone gives zeros and has no gradient.

    Raises:
        ValueError: alpha outside (1, 2], logits that are not floating point, or a tensor `alpha` that does not
            broadcast. NaN and `+inf` are not checked.

    >>> entmax(torch.tensor([1.0, 0.5, -1.0, -torch.inf]), alpha=1.5)
    tensor([0.6740, 0.3260, 0.0000, 0.0000])
    """
    check_alpha(alpha)
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if logits.numel() == 0:
        return logits.clone()
    rows = logits.movedim(dim, -1).to(torch.promote_types(logits.dtype, torch.float32))
    empty = (rows == -torch.inf).all(-1, keepdim=True)
    rows = rows.masked_fill(empty, 0.0)
    if isinstance(alpha, Tensor):
        try:
            alpha = alpha.to(rows.dtype).expand_as(logits.narrow(dim, 0, 1)).movedim(dim, -1)
        except RuntimeError:
            raise ValueError(
                f"alpha must broadcast with logits {tuple(logits.shape)} and be 1 long in dimension {dim}, "
                f"got {tuple(alpha.shape)}"
            ) from None
        probabilities = entmax_bisect(rows, alpha)
    elif alpha == 2:
        probabilities = sparsemax(rows)
    else:
        probabilities = entmax15(rows) if alpha == 1.5 else entmax_bisect(rows, alpha)
    return probabilities.masked_fill(empty, 0.0).movedim(-1, dim).to(logits.dtype)


def check_alpha(alpha: float | Tensor) -> None:
    """Raise `ValueError` unless every alpha is in (1, 2]."""
    low, high = (alpha, alpha) if not isinstance(alpha, Tensor) else map(float, alpha.detach().aminmax())
    if not 1 < low <= high <= 2:  # NaN fails too
        got = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"alpha must be in (1, 2], where softmax is 1 and sparsemax 2; got {got}")
