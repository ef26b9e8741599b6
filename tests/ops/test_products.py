"""Products that share an input, as one operator: one by one on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.ops import products as module
from hf_sparse.ops.products import gated_product, has_kernel, is_faster, product_added, products


def drawn(counts=(6, 2, 3), columns=5, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    x, weights = torch.randn(2, 1, columns, dtype=dtype), [torch.randn(n, columns, dtype=dtype) for n in counts]
    return x, weights, [torch.randn(n, dtype=dtype) for n in counts] if bias else []


@pytest.mark.parametrize("bias", [False, True])
def test_they_are_linear_layers_one_by_one(bias):
    x, weights, biases = drawn(bias=bias)
    found = products(x, weights, biases)
    expected = [F.linear(x, weight, b) for weight, b in zip(weights, biases or [None] * 3, strict=True)]
    assert len(found) == 3 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_added_to_another_tensor(bias):
    x, (weight,), biases = drawn((6,), bias=bias)
    addend, b = torch.randn(2, 1, 6), biases[0] if bias else None
    assert torch.equal(product_added(x, weight, b, addend), addend + F.linear(x, weight, b))


def test_a_gated_product():
    x, (gate, up), _ = drawn((6, 6))
    assert torch.equal(gated_product(x, gate, up), F.silu(x @ gate.T) * (x @ up.T))


def test_the_operators_are_what_torch_expects():
    x, (weight, other), (b, _) = drawn((6, 6))
    for bias in (False, True):
        torch.library.opcheck(products, drawn(bias=bias))
        torch.library.opcheck(product_added, (x, weight, b if bias else None, torch.randn(2, 1, 6)))
    torch.library.opcheck(gated_product, (x, weight, other))


def test_there_is_no_gradient():
    x, weights, biases = drawn()
    (first, *_) = products(x.requires_grad_(), weights, biases)
    with pytest.raises(RuntimeError, match=r"hf_sparse.products.* no autograd formula"):
        first.sum().backward()


def test_what_does_not_fit_is_told():
    x, weights, biases = drawn()
    with pytest.raises(ValueError, match=r"weights must have 5 columns.* got \[\(6, 4\), \(2, 5\)\]"):
        products(x, [weights[0][:, :4], weights[1]], [])
    with pytest.raises(ValueError, match=r"weights must have 5 columns.* got \[\]"):
        products(x, [], [])
    with pytest.raises(ValueError, match=r"biases must be none or have the sizes \[6, 2, 3\], got \[\(6,\), \(2,\)\]"):
        products(x, weights, biases[:2])
    with pytest.raises(
        ValueError, match=r"expected an addend with the shape and dtype of the product, \(\(2, 1, 6\).* got \(\(2, 6\)"
    ):
        product_added(x, weights[0], None, torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"shape and dtype of the product.* got \(\(2, 1, 6\), torch.float64\)"):
        product_added(x, weights[0], None, torch.zeros(2, 1, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gate and up must have one shape, got \(6, 5\) and \(2, 5\)"):
        gated_product(x, weights[0], weights[1])


def test_which_tensors_the_kernel_takes(monkeypatch):
    """Fake tensors have a device, a dtype and strides, which is all that the choice depends on."""
    monkeypatch.setattr(module, "_TRITON", True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):

        def make(*shape, dtype=torch.bfloat16, device="cuda"):
            return torch.empty(shape, dtype=dtype, device=device)

        x, weight, bias = make(16, 1, 64), make(32, 64), make(32)
        assert has_kernel(x, [weight] * 3, [bias] * 3)
        assert not has_kernel(x, [weight] * 4) and not has_kernel(x, [])
        assert not has_kernel(make(17, 64), [weight]) and not has_kernel(make(0, 64), [weight])
        assert not has_kernel(make(1, 64, device="cpu"), [make(32, 64, device="cpu")])
        single = {"dtype": torch.float32}
        assert not has_kernel(make(1, 64, **single), [make(32, 64, **single)])
        assert not has_kernel(x, [make(32, 64, **single)]) and not has_kernel(x, [weight], [make(32, **single)])
        assert not has_kernel(x, [make(64, 32).T]) and not has_kernel(x, [make(0, 64)])
        for columns in (8, 48, 100):  # too few, or such that rows do not begin at a multiple of 16 bytes
            assert has_kernel(make(1, columns), [make(1 << 20, columns)])
            assert not is_faster(make(1, columns), [make(1 << 20, columns)])
        x = make(1, 4096)
        keys = [make(4096, 4096), make(1024, 4096), make(1024, 4096)]
        assert is_faster(x, keys) and is_faster(x, keys[:1]) and is_faster(x, [make(14336, 4096)] * 2)
        assert is_faster(x, [make(64, 4096)] * 2) and not is_faster(x, [make(64, 4096)])
