"""Multiply one input by several weights, in one kernel that reads each weight once, where it is.

Two functions go on to what follows a product in a decoder layer, so that it takes no launch of its own.

A decoding step has few rows, and its products take as long as their weights take to be read. The product of a small
weight alone, such as that of keys or values, ends before it has asked for as much memory as the GPU could read.
"""

from collections.abc import Sequence
from typing import Any

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


@torch.library.custom_op("hf_sparse::product_added", mutates_args=())
def product_added(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """Compute `addend + torch.nn.functional.linear(x, weight, bias)`; there is no gradient.

    The product is rounded before the sum, as it is where it is computed alone.

    Args:
        x: `[..., D]`.
        weight: `[N, D]`, of the dtype of `x`.
        bias: `[N]`, or `None`.
        addend: `[..., N]`, of the dtype of `x`.

    Returns:
        `[..., N]`, contiguous.

    Raises:
        ValueError: the weight does not fit the input, the bias not the weight, or the addend not the product.
    """
    biases = [] if bias is None else [bias]
    _check(x, [weight], biases)
    if (addend.shape, addend.dtype) != (x.shape[:-1] + weight.shape[:1], x.dtype):
        expected, found = (tuple(x.shape[:-1] + weight.shape[:1]), x.dtype), (tuple(addend.shape), addend.dtype)
        raise ValueError(f"expected an addend with the shape and dtype of the product, {expected}, got {found}")
    if has_kernel(x, [weight], biases):
        from hf_sparse.ops.triton.products import fused_product_added

        with torch.cuda.device_of(x):
            return fused_product_added(x, weight, bias, addend)
    return addend + F.linear(x, weight, bias)


@product_added.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("hf_sparse::gated_product", mutates_args=())
def gated_product(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Compute `silu(x gate^T) * (x up^T)`, the first half of the MLP of a Llama; there is no gradient.

    Both products are rounded before the rest, as they are where they are computed alone.

    Args:
        x: `[..., D]`.
        gate, up: `[N, D]`, of the dtype of `x`.

    Returns:
        `[..., N]`, contiguous.

    Raises:
        ValueError: a weight does not fit the input, or the other.
    """
    _check(x, [gate, up], [])
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    if has_kernel(x, [gate, up]):
        from hf_sparse.ops.triton.products import fused_gated_product

        with torch.cuda.device_of(x):
            return fused_gated_product(x, gate, up)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@gated_product.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


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


def begin_product(operator: Any, arguments: Sequence[Any], device: torch.device) -> None:
    """Compile in the background the kernel of one of the three operators, so that its first call finds it.

    Args:
        operator: such as `torch.ops.hf_sparse.products.default`, of a call for which `has_kernel` holds.
        arguments: of the call; of tensors, which may be fake ones, shapes and dtypes are read.
        device: of these tensors; nothing begins for one that is no GPU.
    """
    if _TRITON and device.type == "cuda":
        from hf_sparse.ops.triton import products as kernels

        kernels.begin_product(getattr(kernels, KERNELS[operator]), arguments, device)


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


#: Functions of `hf_sparse.ops.triton.products` by the operator whose kernel they launch.
KERNELS = {
    torch.ops.hf_sparse.products.default: "fused_products",
    torch.ops.hf_sparse.product_added.default: "fused_product_added",
    torch.ops.hf_sparse.gated_product.default: "fused_gated_product",
}
