"""Multiply one input by up to three weights in one kernel; `hf_sparse.ops.products` defines it.

A program owns a block of rows of one weight. It goes over their columns in steps, several of which are on their way
from memory at a time, and adds up in float32: for one row of the input number by number, for more by tensor cores,
which take 8 or 16 rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.sizes import pieces


class ProductSizes(NamedTuple):
    """Hold the sizes of a program: rows and columns of a weight in a step, warps, steps at a time."""

    outputs: int
    columns: int
    warps: int
    stages: int
    tensor_cores: bool


def sizes_of(rows: int, columns: int) -> ProductSizes:
    """Choose sizes for rows of the input and their length; `benchmarks/products.py --search` finds what is best."""
    sizes = ProductSizes(8, 512, 4, 4, False) if rows == 1 else ProductSizes(16 if rows <= 8 else 32, 256, 2, 4, True)
    step = sizes.columns
    while step > 64 and pieces(columns, step) * step > columns + columns // 8:  # of the last step much is in vain
        step //= 2
    return sizes._replace(columns=step)


def fused_products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], sizes: ProductSizes | None = None
) -> list[Tensor]:
    """Compute the products; see `ops.products.products`, whose `has_kernel` holds. Sizes are chosen if not given."""
    x, columns = x.contiguous(), x.shape[-1]
    rows, counts = x.numel() // columns, [len(weight) for weight in weights]
    sizes = sizes or sizes_of(rows, columns)
    results = [torch.empty((*x.shape[:-1], count), dtype=x.dtype, device=x.device) for count in counts]
    launch(_products, (sum(pieces(count, sizes.outputs) for count in counts),))(
        x, *_three(weights), *_three(biases or (None,)), *_three(results), *counts, *[0] * (3 - len(counts)),
        rows, columns, ROWS=(8 if rows <= 8 else 16) if sizes.tensor_cores else 1, OUTPUTS=sizes.outputs,
        COLUMNS=sizes.columns, STAGES=sizes.stages, TENSOR_CORES=sizes.tensor_cores, num_warps=sizes.warps,
    )  # fmt: skip
    return results


def _three(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Fill up to three by the first, whose type the kernel is compiled for already."""
    return [*values, *[values[0]] * (3 - len(values))]


@triton.jit
def _choose(place, second, third, A, B, C):
    """Return the pointer of the weight that the block `place` belongs to."""
    return tl.where(place >= third, C, tl.where(place >= second, B, A))


@triton.jit(do_not_specialize=["count_0", "count_1", "count_2", "rows"])
def _products(
    X,
    W0,
    W1,
    W2,
    B0,
    B1,
    B2,
    Y0,
    Y1,
    Y2,
    count_0,
    count_1,
    count_2,
    rows,
    columns,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    """Compute OUTPUTS columns of one of the results; `count_i` is the number of rows of weight i, 0 for none."""
    place = tl.program_id(0)
    second = tl.cdiv(count_0, OUTPUTS)
    third = second + tl.cdiv(count_1, OUTPUTS)
    count = _choose(place, second, third, count_0, count_1, count_2)
    block = place - _choose(place, second, third, 0, second, third)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    there = output < count
    row, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < rows
    W = _choose(place, second, third, W0, W1, W2) + output.to(tl.int64)[:, None] * columns + step[None, :]
    if TENSOR_CORES:
        X += row[None, :] * columns + step[:, None]
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    else:
        X += step
        parts = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
    for begin in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        known = begin + step < columns
        w = tl.load(W + begin, mask=there[:, None] & known[None, :], other=0.0)
        if TENSOR_CORES:
            x = tl.load(X + begin, mask=known[:, None] & inside[None, :], other=0.0)
            total = tl.dot(w, x, total)
        else:
            x = tl.load(X + begin, mask=known, other=0.0)
            parts += w.to(tl.float32) * x.to(tl.float32)[None, :]
    if not TENSOR_CORES:
        total = tl.sum(parts, 1)[:, None]
    if B0 is not None:
        bias = tl.load(_choose(place, second, third, B0, B1, B2) + output, mask=there, other=0.0)
        total += bias.to(tl.float32)[:, None]
    Y = _choose(place, second, third, Y0, Y1, Y2) + row[None, :] * count + output[:, None]
    tl.store(Y, total.to(X.dtype.element_ty), mask=there[:, None] & inside[None, :])
