"""Multiply one input by up to three weights in one kernel; `hf_sparse.ops.products` defines it.

A program owns a block of rows of one weight. It goes over their columns in steps, several of which are on their way
from memory at a time, and adds up in float32: for one row of the input number by number, for more by tensor cores,
which take 8 or 16 rows.

Tensor cores are fast with 64 rows, and blocks of 64 rows would be too few for the GPU. So the columns of a step are cut
into parts, whose rows stand one below the other as if they were rows of a larger block; those of the input do so too:

    [W_0]                 [W_0 X_0   W_0 X_1]
    [W_1] [X_0   X_1]  =  [W_1 X_0   W_1 X_1]        W X = W_0 X_0 + W_1 X_1

The blocks off the diagonal are computed in vain, which costs nothing while the kernel waits for memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.triton.launch import begin_compiling, launch
from hf_sparse.ops.triton.sizes import pieces


class ProductSizes(NamedTuple):
    """Hold the sizes of a program.

    Args:
        outputs: rows of the weight.
        columns: of a part of a step.
        parts: of a step, which tensor cores multiply at a time; 0 for one part without tensor cores, and one row.
        warps: of the program.
        stages: steps at a time.
    """

    outputs: int
    columns: int
    parts: int
    warps: int
    stages: int


def sizes_of(rows: int, columns: int, outputs: int) -> ProductSizes:
    """Choose sizes: those that `benchmarks/products.py --search` found best for a Llama of 8B on an H200.

    Args:
        rows: of the input.
        columns: of the weights.
        outputs: rows of all weights.
    """
    are_many = outputs > 5000  # enough blocks for larger ones
    if rows == 1:
        sizes = ProductSizes(4, 1024, 0, 8, 5) if are_many else ProductSizes(8, 512, 0, 4, 4)
    else:
        sizes = ProductSizes(32, 64, 2, 4, 6) if are_many or rows > 8 else ProductSizes(16, 128, 4, 4, 3)
    part, parts = sizes.columns, max(1, sizes.parts)
    while part > 32 and pieces(columns, part * parts) * part * parts > columns + columns // 8:  # the rest is in vain
        part //= 2
    return sizes._replace(columns=part)


def fused_products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], sizes: ProductSizes | None = None
) -> list[Tensor]:
    """Compute the products; see `ops.products.products`, whose `has_kernel` holds. Sizes are chosen if not given."""
    x, columns = x.contiguous(), x.shape[-1]
    rows, counts = x.numel() // columns, [len(weight) for weight in weights]
    sizes = sizes or sizes_of(rows, columns, sum(counts))
    results = [torch.empty((*x.shape[:-1], count), dtype=x.dtype, device=x.device) for count in counts]
    launch(_products, (sum(pieces(count, sizes.outputs) for count in counts),))(
        x, *_three(weights), *_three(biases or (None,)), *_three(results), *counts, *[0] * (3 - len(counts)),
        rows, columns, ROWS=(8 if rows <= 8 else 16) if sizes.parts else 1, OUTPUTS=sizes.outputs,
        COLUMNS=sizes.columns, PARTS=sizes.parts, STAGES=sizes.stages, num_warps=sizes.warps,
    )  # fmt: skip
    return results


def begin_products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Compile in the background the kernel for tensors like these, of which shapes, dtype and device are read."""
    sizes = [[tuple(map(int, tensor.shape)) for tensor in tensors] for tensors in ((x,), weights, biases)]

    def calls() -> None:
        (like_x,), *parameters = [[torch.empty(size, dtype=x.dtype, device="meta") for size in some] for some in sizes]
        fused_products(like_x, parameters[0], parameters[1])

    begin_compiling(_products, calls, x.device)


def _three(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Fill up to three by the first, whose type the kernel is compiled for already."""
    return [*values, *[values[0]] * (3 - len(values))]


@triton.jit
def _choose(place, second, third, A, B, C):
    """Return the pointer of the weight that the block `place` belongs to."""
    return tl.where(place >= third, C, tl.where(place >= second, B, A))


@triton.jit(do_not_specialize=["count_0", "count_1", "count_2", "rows"])
def _products(
    X, W0, W1, W2, B0, B1, B2, Y0, Y1, Y2, count_0, count_1, count_2, rows, columns,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute OUTPUTS columns of one of the results; `count_i` is the number of rows of weight i, 0 for none."""
    place = tl.program_id(0)
    second = tl.cdiv(count_0, OUTPUTS)
    third = second + tl.cdiv(count_1, OUTPUTS)
    count = _choose(place, second, third, count_0, count_1, count_2)
    block = place - _choose(place, second, third, 0, second, third)
    output, row = block * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    there, inside = output < count, row < rows
    W = _choose(place, second, third, W0, W1, W2)
    step = tl.arange(0, COLUMNS)
    if PARTS == 0:
        W += output.to(tl.int64)[:, None] * columns + step[None, :]
        summed = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
        for begin in tl.range(0, columns, COLUMNS, num_stages=STAGES):
            known = begin + step < columns
            w = tl.load(W + begin, mask=there[:, None] & known[None, :], other=0.0)
            x = tl.load(X + begin + step, mask=known, other=0.0)
            summed += w.to(tl.float32) * x.to(tl.float32)[None, :]
        total = tl.sum(summed, 1)[:, None]
    else:
        below, beside = tl.arange(0, PARTS * OUTPUTS), tl.arange(0, PARTS * ROWS)
        of_w = (below // OUTPUTS * COLUMNS)[:, None] + step[None, :]
        of_x = (beside // ROWS * COLUMNS)[None, :] + step[:, None]
        row_of_w, row_of_x = block * OUTPUTS + below % OUTPUTS, beside % ROWS
        W += row_of_w.to(tl.int64)[:, None] * columns + of_w
        At = X + row_of_x[None, :] * columns + of_x
        product = tl.zeros([PARTS * OUTPUTS, PARTS * ROWS], tl.float32)
        for begin in tl.range(0, columns, PARTS * COLUMNS, num_stages=STAGES):
            w = tl.load(W + begin, mask=(row_of_w < count)[:, None] & (begin + of_w < columns), other=0.0)
            x = tl.load(At + begin, mask=(row_of_x < rows)[None, :] & (begin + of_x < columns), other=0.0)
            product = tl.dot(w, x, product)
        part = tl.arange(0, PARTS)
        diagonal = part[:, None, None, None] == part[None, None, :, None]
        product = tl.reshape(product, [PARTS, OUTPUTS, PARTS, ROWS])
        total = tl.sum(tl.sum(tl.where(diagonal, product, 0.0), 2), 0)
    if B0 is not None:
        bias = tl.load(_choose(place, second, third, B0, B1, B2) + output, mask=there, other=0.0)
        total += bias.to(tl.float32)[:, None]
    Y = _choose(place, second, third, Y0, Y1, Y2) + row[None, :] * count + output[:, None]
    tl.store(Y, total.to(X.dtype.element_ty), mask=there[:, None] & inside[None, :])
