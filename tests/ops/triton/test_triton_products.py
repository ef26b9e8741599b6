"""The kernel of products that share an input, against PyTorch in float64."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.ops.products import KERNELS
from hf_sparse.ops.triton import products
from hf_sparse.ops.triton.products import (
    ProductSizes,
    fused_gated_product,
    fused_product_added,
    fused_products,
    sizes_of,
)

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
COUNTS = [(48,), (33, 16), (40, 8, 17), (7, 1, 5)]  # rows of the weights
SIZES = [
    None,
    ProductSizes(4, 128, 0, 4, 1),
    ProductSizes(16, 64, 1, 1, 3),
    ProductSizes(16, 32, 4, 4, 4),
    ProductSizes(64, 64, 2, 4, 3),
]


def drawn(rows, columns, counts, bias, dtype):
    torch.manual_seed(columns)
    x = torch.randn(rows, 1, columns, device=DEVICE).to(dtype)
    weights = [torch.randn(count, columns, device=DEVICE).to(dtype) for count in counts]
    return x, weights, [5 * torch.randn(count, device=DEVICE).to(dtype) for count in counts] if bias else []


def chosen(sizes, rows, columns, outputs, dtype):
    """Return sizes that take the rows; the interpreter has no products of bfloat16."""
    if sizes is None or (rows > 1 and not sizes.parts):  # which takes one row
        sizes = sizes_of(rows, columns, outputs)
    if DEVICE == "cpu" and dtype == torch.bfloat16 and sizes.parts:
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    return sizes


@pytest.mark.cross("pairs")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("columns", [64, 200, 129, 576])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
def test_products(rows, columns, counts, bias, dtype, sizes, poisoned_memory):
    """Each is rounded once: it is half a place from the exact one, and what float32 loses in the sum."""
    sizes = chosen(sizes, rows, columns, sum(counts), dtype)
    x, weights, biases = drawn(rows, columns, counts, bias, dtype)
    places = 1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.5  # the interpreter cuts bfloat16 off
    found = fused_products(x, weights, biases, sizes)
    assert len(found) == len(weights)
    for i, (result, weight) in enumerate(zip(found, weights, strict=True)):
        expected = x.double() @ weight.double().T + (biases[i].double() if bias else 0)
        assert result.shape == (rows, 1, len(weight)) and result.dtype == dtype and result.is_contiguous()
        error = (result.double() - expected).abs()
        assert bool((error <= places * torch.finfo(dtype).eps * expected.abs() + 2e-4).all())


def close(found, expected, dtype, magnitude):
    """Tell whether results are at most two roundings of the numbers they are computed from away."""
    places = 4 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2  # the interpreter cuts bfloat16 off
    error = (found.double() - expected).abs()
    return bool((error <= places * torch.finfo(dtype).eps * magnitude + 1e-3).all())


@pytest.mark.cross("pairs")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [48, 33, 7])
@pytest.mark.parametrize("columns", [64, 200, 129, 576])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
def test_a_product_is_added_to_another_tensor(rows, columns, count, bias, dtype, sizes, poisoned_memory):
    sizes = chosen(sizes, rows, columns, count, dtype)
    x, (weight,), biases = drawn(rows, columns, (count,), bias, dtype)
    addend = torch.randn(count, rows, device=DEVICE).to(dtype).T[:, None]  # not contiguous
    found = fused_product_added(x, weight, biases[0] if bias else None, addend, sizes)
    product = x.double() @ weight.double().T + (biases[0].double() if bias else 0)
    assert found.shape == (rows, 1, count) and found.dtype == dtype and found.is_contiguous()
    assert close(found, product + addend.double(), dtype, product.abs() + addend.abs().double())


@pytest.mark.cross("pairs")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [48, 33, 7, 1])
@pytest.mark.parametrize("columns", [64, 200, 129, 576])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
def test_a_gated_product(rows, columns, count, dtype, sizes, poisoned_memory):
    sizes = chosen(sizes, rows, columns, 2 * count, dtype)
    x, (gate, up), _ = drawn(rows, columns, (count, count), False, dtype)
    gate = gate / columns**0.5  # so that neither all is let through nor nothing
    found = fused_gated_product(x, gate, up, sizes)
    gates, ups = x.double() @ gate.double().T, x.double() @ up.double().T
    assert found.shape == (rows, 1, count) and found.dtype == dtype and found.is_contiguous()
    magnitude = (1 + gates.abs()) * ups.abs()
    assert close(found, F.silu(gates) * ups, dtype, magnitude) and not close(found, F.silu(ups) * gates, dtype, 0)


@pytest.mark.parametrize(("rows", "bias"), [(1, False), (5, True), (16, False)])
@pytest.mark.parametrize("name", sorted(KERNELS.values()))
def test_what_begins_is_what_is_launched(name, rows, bias, monkeypatch):
    """From shapes alone: the pass over a graph has no tensors with content."""
    launched = []

    def launch(kernel, grid):
        def call(*arguments, **constants):
            types = [x.dtype if isinstance(x, torch.Tensor) else x for x in arguments]
            launched.append((arguments[0].is_meta, (kernel, grid, types, constants)))

        return call

    monkeypatch.setattr(products, "launch", launch)
    monkeypatch.setattr(products, "begin_compiling", lambda kernel, calls, device: calls())
    x, weights, biases = drawn(rows, 576, (40, 40, 40), bias, torch.bfloat16)
    arguments = {
        "fused_products": (x, weights, biases),
        "fused_product_added": (x, weights[0], biases[0] if bias else None, torch.zeros(rows, 1, 40, dtype=x.dtype)),
        "fused_gated_product": (x, *weights[:2]),
    }[name]
    products.begin_product(getattr(products, name), arguments, x.device)
    getattr(products, name)(*arguments)
    (is_begun, begun), (is_meta, found) = launched
    assert is_begun and not is_meta and begun == found


def test_an_input_that_is_not_contiguous():
    x, weights, _ = drawn(4, 64, (24, 9), False, torch.float16)
    turned = x[:, 0].T.contiguous().T
    assert not turned.is_contiguous()
    for found, expected in zip(fused_products(turned, weights, []), fused_products(x[:, 0], weights, []), strict=True):
        assert torch.equal(found, expected)


def test_nan_stays_in_its_row():
    x, weights, _ = drawn(3, 64, (24, 9), False, torch.float16)
    x[1, 0, 5] = torch.nan
    for result in fused_products(x, weights, []):
        assert result[1].isnan().all() and not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("columns", [576, 1536, 2048, 4096, 5632, 14336])
@pytest.mark.parametrize("outputs", [576, 28672])
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_steps_reach_over_the_columns_by_an_eighth_at_most(rows, columns, outputs):
    """In as much shared memory as GPUs with little of it have."""
    sizes = sizes_of(rows, columns, outputs)
    read, parts = 1 if rows == 1 else 8 if rows <= 8 else 16, max(1, sizes.parts)
    assert -(-columns // (parts * sizes.columns)) * parts * sizes.columns <= columns * 9 / 8 and sizes.columns >= 32
    assert 2 * sizes.stages * parts * (sizes.outputs + read) * sizes.columns <= 99 << 10
    assert (sizes.parts > 0) == (rows > 1)


def test_the_benchmark_searches_sizes(monkeypatch, tmp_path):
    """A trial of it: the rows are complete, and the size in use is among those of the search."""
    output = tmp_path / "products.json"
    words = ["products.py", "--tiny", "--search", "--dtype", "float16", "--rows", "1", "4", "--commit", "0"]
    monkeypatch.setattr(sys, "argv", [*words, "--shapes", "llama-8b", "--output", str(output)])
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / "products.py"), run_name="__main__")
    rows = json.loads(output.read_text())["rows"]
    assert [(row["product"], row["rows"]) for row in rows[:3]] == [("qkv", 1), ("qkv", 4), ("output", 1)]
    assert len(rows) == 8
    for row in rows:
        sizes = [[one[name] for name in ProductSizes._fields] for one in row["search"]]
        assert row["sizes"] in sizes and len(sizes) > 3 and row["kernel_us"] > 0 and row["roundings"] < 1
