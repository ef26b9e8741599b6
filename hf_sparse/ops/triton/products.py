"""Multiply one input by up to three weights in one kernel; `hf_sparse.ops.products` defines it.

A program owns a block of rows of one weight. It goes over their columns in steps, several of which are on their way
from memory at a time, and adds up in float32: for one row of the input number by number, for more by tensor cores,
which take 8 or 16 rows.

Tensor cores are fast with 64 rows, and blocks of 64 rows would be too few for the GPU. So the columns of a step are cut
into parts, whose rows stand one below the other as if they were rows of a larger block; those of the input do so too:

    [W_0]                 [W_0 X_0   W_0 X_1]
    [W_1] [X_0   X_1]  =  [W_1 X_0   W_1 X_1]        W X = W_0 X_0 + W_1 X_1

The blocks off the diagonal are computed in vain, which costs nothing while the kernel waits for memory.

What follows a product in a decoder layer may be done before it is stored, which spares a launch each: the sum with
another tensor, and the product of a gate and what it lets through. For the latter one half of a program's rows are of
the one weight, and the other half the same rows of the other.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
    elif rows > 8 and outputs > 20_000:
        sizes = ProductSizes(64, 128, 1, 4, 4)
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
    results = [x.new_empty((*x.shape[:-1], len(weight))) for weight in weights]
    _launch(x, weights, biases, results, sizes)
    return results


def fused_product_added(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor, sizes: ProductSizes | None = None
) -> Tensor:
    """Compute a product and a sum; see `ops.products.product_added`."""
    result = torch.empty_like(addend, memory_format=torch.contiguous_format)
    _launch(x, [weight], [] if bias is None else [bias], [result], sizes, addend.contiguous())
    return result


def fused_gated_product(x: Tensor, gate: Tensor, up: Tensor, sizes: ProductSizes | None = None) -> Tensor:
    """Compute the product of a gate and what it lets through; see `ops.products.gated_product`."""
    result = x.new_empty((*x.shape[:-1], len(gate)))
    _launch(x, [gate, up], [], [result], sizes)
    return result


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    results: Sequence[Tensor],
    sizes: ProductSizes | None,
    addend: Tensor | None = None,
) -> None:
    """Launch the kernel; two weights with one result are a gate and what it lets through."""
    x, columns, gated = x.contiguous(), x.shape[-1], len(weights) > len(results)
    rows, counts = x.numel() // columns, [len(weight) for weight in weights]
    sizes = sizes or sizes_of(rows, columns, sum(counts))
    held = sizes.outputs // 2 if gated else sizes.outputs
    programs = sum(pieces(count, held) for count in counts[: len(results)])
    launch(_products, (programs,))(
        x, *_three(weights), *_three(biases or (None,)), addend, *_three(results), *counts, *[0] * (3 - len(counts)),
        rows, columns, ROWS=(8 if rows <= 8 else 16) if sizes.parts else 1, OUTPUTS=sizes.outputs,
        COLUMNS=sizes.columns, PARTS=sizes.parts, STAGES=sizes.stages, GATED=gated, num_warps=sizes.warps,
    )  # fmt: skip


def begin_product(product: Callable[..., object], arguments: Sequence[Any], device: torch.device) -> None:
    """Compile in the background what a product launches.

    Args:
        product: one of the three functions above.
        arguments: tensors, of which shapes and dtypes are read, sequences of tensors, or `None`.
        device: on which it will run.
    """

    def like(one: Any) -> Any:
        if isinstance(one, Tensor):
            return torch.empty(tuple(map(int, one.shape)), dtype=one.dtype, device="meta")
        return None if one is None else [like(each) for each in one]

    begin_compiling(_products, partial(product, *[like(one) for one in arguments]), device)


def _three(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Fill up to three by the first, whose type the kernel is compiled for already."""
    return [*values, *[values[0]] * (3 - len(values))]


@triton.jit
def _choose(place, second, third, A, B, C):
    """Return the pointer of the weight that the block `place` belongs to."""
    return tl.where(place >= third, C, tl.where(place >= second, B, A))


@triton.jit
def _rows_of(W, W1, row, HELD, GATED: tl.constexpr):
    """Return the pointers of rows of a program: of one weight, or in halves of HELD of two."""
    return tl.where(row < HELD, W, W1)[:, None] if GATED else W


@triton.jit(do_not_specialize=["count_0", "count_1", "count_2", "rows"])
def _products(
    X, W0, W1, W2, B0, B1, B2, A, Y0, Y1, Y2, count_0, count_1, count_2, rows, columns,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Compute HELD columns of one of the results; `count_i` is the number of rows of weight i, 0 for none.

    `A` is added, unless it is None. If GATED, the result is silu(X W0^T) * (X W1^T), and OUTPUTS are of both weights.
    """
    HELD: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    place = tl.program_id(0)
    second = tl.cdiv(count_0, HELD)
    third = second + tl.cdiv(count_1, HELD)
    count = _choose(place, second, third, count_0, count_1, count_2)
    block = place - _choose(place, second, third, 0, second, third)
    W = _choose(place, second, third, W0, W1, W2)
    step, row = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    if PARTS == 0:
        member = tl.arange(0, OUTPUTS)
        row_of_w = block * HELD + member % HELD
        At_w = _rows_of(W, W1, member, HELD, GATED) + row_of_w.to(tl.int64)[:, None] * columns + step[None, :]
        summed = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
        for begin in tl.range(0, columns, COLUMNS, num_stages=STAGES):
            known = begin + step < columns
            w = tl.load(At_w + begin, mask=(row_of_w < count)[:, None] & known[None, :], other=0.0)
            x = tl.load(X + begin + step, mask=known, other=0.0)
            summed += w.to(tl.float32) * x.to(tl.float32)[None, :]
        total = tl.sum(summed, 1)[:, None]
    else:
        below, beside = tl.arange(0, PARTS * OUTPUTS), tl.arange(0, PARTS * ROWS)
        member = below % OUTPUTS
        of_w = (below // OUTPUTS * COLUMNS)[:, None] + step[None, :]
        of_x = (beside // ROWS * COLUMNS)[None, :] + step[:, None]
        row_of_w, row_of_x = block * HELD + member % HELD, beside % ROWS
        At_w = _rows_of(W, W1, member, HELD, GATED) + row_of_w.to(tl.int64)[:, None] * columns + of_w
        At_x = X + row_of_x[None, :] * columns + of_x
        product = tl.zeros([PARTS * OUTPUTS, PARTS * ROWS], tl.float32)
        for begin in tl.range(0, columns, PARTS * COLUMNS, num_stages=STAGES):
            w = tl.load(At_w + begin, mask=(row_of_w < count)[:, None] & (begin + of_w < columns), other=0.0)
            x = tl.load(At_x + begin, mask=(row_of_x < rows)[None, :] & (begin + of_x < columns), other=0.0)
            product = tl.dot(w, x, product)
        part = tl.arange(0, PARTS)
        diagonal = part[:, None, None, None] == part[None, None, :, None]
        product = tl.reshape(product, [PARTS, OUTPUTS, PARTS, ROWS])
        total = tl.sum(tl.sum(tl.where(diagonal, product, 0.0), 2), 0)
    output = block * HELD + tl.arange(0, HELD)
    there = (output < count)[:, None] & (row < rows)[None, :]
    if B0 is not None:
        bias = tl.load(_choose(place, second, third, B0, B1, B2) + output, mask=output < count, other=0.0)
        total += bias.to(tl.float32)[:, None]
    At = row[None, :] * count + output[:, None]
    if GATED:  # of numbers that are rounded, as those of two products are
        both = tl.permute(tl.reshape(total, [2, HELD, ROWS]), (1, 2, 0)).to(X.dtype.element_ty).to(tl.float32)
        gate, up = tl.split(both)
        total = gate / (1 + tl.exp(-gate)) * up
    if A is not None:
        total = total.to(X.dtype.element_ty).to(tl.float32) + tl.load(A + At, mask=there, other=0.0).to(tl.float32)
    tl.store(_choose(place, second, third, Y0, Y1, Y2) + At, total.to(X.dtype.element_ty), mask=there)
