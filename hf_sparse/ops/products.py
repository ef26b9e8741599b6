"""Multiply one input by several weights, in one kernel that reads each weight once, where it is.

A decoding step has few rows, and its products take as long as their weights take to be read. The product of a small
weight alone, such as that of keys or values, ends before it has asked for as much memory as the GPU could read.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.triton import installed

MOST_WEIGHTS = 3  # of a call of the kernel
MOST_ROWS = 16  # that the kernel takes: it reads the input again for every block of a weight
_FEWEST_NUMBERS = 1 << 19  # of all weights of a call; fewer ones cuBLAS multiplies as fast
_DTYPES = (torch.bfloat16, torch.float16)
_TRITON = installed()


@torch.library.custom_op("hf_sparse::products", mutates_args=())
def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Compute `torch.nn.functional.linear` of one input with each weight; there is no gradient.

    The kernel adds up in float32 and rounds once. Elsewhere the products are PyTorch's, one by one.

    Args:
        x: `[..., D]`.
        weights: one or more of `[N_i, D]`, of the dtype of `x`.
        biases: `[N_i]` for each weight, or none at all.

    Returns:
        `[..., N_i]` for each weight, contiguous.

    Raises:
        ValueError: there is no weight, one does not fit the input, or biases do not fit the weights.
    """
    _check(x, weights, biases)
    if has_kernel(x, weights, biases):
        from hf_sparse.ops.triton.products import fused_products

        with torch.cuda.device_of(x):  # where Triton launches
            return fused_products(x, weights, biases)
    given = biases or (None,) * len(weights)
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, given, strict=True)]


@products.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def has_kernel(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> bool:
    """Tell whether the kernel takes tensors, which may be fake ones: device, dtype, layout and number of rows."""
    parameters = [*weights, *biases]
    return (
        _TRITON
        and x.device.type == "cuda"
        and x.dtype in _DTYPES
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and 0 < len(weights) <= MOST_WEIGHTS
        and all(
            one.device == x.device and one.dtype == x.dtype and one.is_contiguous() and one.numel() > 0
            for one in parameters
        )
    )


def is_faster(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> bool:
    """Tell whether the kernel takes tensors, which may be fake ones, and is expected to be faster than cuBLAS.

    So it was on an H200, in products of three model sizes of as many numbers, at batch 1 to 8; at 16 gate and up took
    as long or 4 % longer (`benchmarks/products.py`). The sizes of programs have followed a search since.
    """
    # Rows of other lengths cannot be read 16 bytes at a time; short ones are those of low ranks.
    fits = x.shape[-1] % 16 == 0 and x.shape[-1] >= 64
    return has_kernel(x, weights, biases) and fits and sum(weight.numel() for weight in weights) >= _FEWEST_NUMBERS


def begin_products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
    """Compile in the background the kernel for tensors like these, which may be fake ones."""
    if has_kernel(x, weights, biases):
        from hf_sparse.ops.triton import products as kernels

        kernels.begin_products(x, weights, biases)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    expected = [x.shape[-1:]] * len(weights)
    if not weights or [weight.shape[1:] for weight in weights] != expected:
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(
            f"weights must have {x.shape[-1]} columns, as the input of shape {tuple(x.shape)}, got {shapes}"
        )
    if biases and [bias.shape for bias in biases] != [weight.shape[:1] for weight in weights]:
        sizes, shapes = [len(weight) for weight in weights], [tuple(bias.shape) for bias in biases]
        raise ValueError(f"biases must be none or have the sizes {sizes}, got {shapes}")
