"""The kernels of linear scores against PyTorch in float64."""

import copy

import pytest
import torch

from hf_sparse import SparseKConfig
from hf_sparse.methods.sparsek.scorer import make_scorer
from hf_sparse.ops.selection.linear_scores import Slopes, has_kernels, normalised
from hf_sparse.ops.selection.triton import linear_scores as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
# batch, tokens, features, KV heads
SHAPES = [(1, 1, 64, 1), (2, 37, 96, 3), (1, 70, 576, 8), (3, 5, 129, 20), (1, 33, 16, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(states, weight):
    return torch.einsum("btc,hc->bht", normalised(states), weight.to(torch.float64))


def inputs(shape, dtype, weights=torch.float32):
    batch, length, columns, heads = shape
    torch.manual_seed(length)
    states = 3 * torch.randn(batch, length, columns, device=DEVICE) + 2
    weight = torch.randn(heads, columns, device=DEVICE)
    return states.to(dtype).requires_grad_(), weight.to(weights).requires_grad_()


@pytest.mark.cross("values")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(shape, dtype, poisoned_memory):
    states, weight = inputs(shape, dtype)
    found = kernels.linear_scores(states, weight)
    assert found.dtype == torch.float64 and found.is_contiguous()
    torch.testing.assert_close(found, plain(states, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.cross("values")
@pytest.mark.parametrize("learned, slope_length", [(False, 0), (True, 0), (True, 5), (False, 100)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_with_slopes_are_rounded_once(shape, learned, slope_length, poisoned_memory):
    states, weight = (tensor.detach() for tensor in inputs(shape, torch.float16))
    batch, length, _, heads = shape
    slope = torch.randn(heads, device=DEVICE) if learned else None
    index = torch.arange(length, device=DEVICE).expand(batch, -1)
    found = kernels.token_scores(states, weight, slope, index, Slopes(0.01, 256, slope_length))
    slopes = 0.01 + (0 if slope is None else slope.double()[:, None] / 256)
    risen = slope_length * torch.log1p(index.double() / slope_length) if slope_length else index.double()
    expected = (plain(states, weight) + risen[:, None] * slopes).float()
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.cross("values")
@pytest.mark.parametrize("programs", [1, 16, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype, programs, poisoned_memory, monkeypatch):
    """One rounding of each, to the dtype of what it is a gradient of."""
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    states, weight = inputs(shape, dtype)
    upstream = torch.randn_like(kernels.linear_scores(states, weight))
    found = torch.autograd.grad(kernels.linear_scores(states, weight), (states, weight), upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    expected = torch.autograd.grad(plain(*wide), wide, upstream)
    for ours, theirs, like in zip(found, expected, (states, weight), strict=True):
        assert ours.dtype == like.dtype and ours.shape == like.shape
        # Of one token there is nothing but rounding left: its normalised input has no direction to move in.
        scale = max(float(theirs.abs().max()), float(upstream.abs().max()))
        error = float((ours.double() - theirs).abs().max())
        assert error <= scale * max(2e-6, torch.finfo(like.dtype).eps)


@pytest.mark.parametrize("wanted", ["states", "weight"])
def test_what_nobody_wants_is_not_computed(wanted, poisoned_memory):
    states, weight = inputs((2, 37, 96, 3), torch.float32)
    both = torch.autograd.grad(kernels.linear_scores(states, weight).sum(), (states, weight))
    kept = {"states": states, "weight": weight}
    for name, tensor in kept.items():
        tensor.requires_grad_(name == wanted)
    one = torch.autograd.grad(kernels.linear_scores(states, weight).sum(), kept[wanted])[0]
    other = both[wanted == "weight"]
    # Two programs, which a compiler may let add in another order: each is within the bound of `test_gradients`.
    assert float((one - other).abs().max()) <= float(other.abs().max()) * 2 * 2e-6


def test_weights_of_a_model_in_half_precision_and_views():
    states, weight = inputs((2, 37, 96, 3), torch.float32, torch.bfloat16)
    torch.testing.assert_close(kernels.linear_scores(states, weight), plain(states, weight), rtol=1e-12, atol=1e-12)
    turned = states.detach().transpose(0, 1).requires_grad_()
    found = kernels.linear_scores(turned, weight)
    torch.testing.assert_close(found, plain(turned, weight), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(found.sum(), (turned, weight))
    theirs = torch.autograd.grad(plain(turned, weight).sum(), (turned, weight))
    assert ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("batch, length", [(0, 4), (2, 0)])
def test_no_token_at_all(batch, length):
    states, weight = inputs((batch, length, 16, 3), torch.float32)
    found = kernels.linear_scores(states, weight)
    assert found.shape == (batch, 3, length)
    gradients = torch.autograd.grad(found.sum(), (states, weight))
    assert gradients[0].shape == states.shape and not gradients[1].any()


def test_a_repeated_token_has_the_same_score_to_the_last_bit():
    """In any row, and the same that PyTorch computes once both are float32."""
    states, weight = inputs((1, 40, 576, 8), torch.float32)
    states = states[:, [7, *range(39), 7, 7]]
    found = kernels.linear_scores(states, weight)
    assert torch.equal(found[..., 0], found[..., -1]) and torch.equal(found[..., 0], found[..., -2])
    assert torch.equal(found.float(), plain(states, weight).float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: only there kernels are chosen")
def test_a_scorer_on_a_gpu_is_that_on_the_cpu():
    states, _ = inputs((2, 37, 96, 3), torch.bfloat16)
    assert has_kernels(states) and not has_kernels(states.double()) and not has_kernels(states.cpu())
    module = make_scorer(SparseKConfig(), hidden_size=96, num_key_value_heads=3, causal=True).to(DEVICE)
    other = copy.deepcopy(module).cpu()
    index, upstream = torch.arange(37, device=DEVICE).expand(2, -1), torch.randn(2, 3, 37, device=DEVICE)
    found, expected = module(states, index), other(states.detach().cpu(), index.cpu())
    assert torch.equal(found.cpu(), expected)
    gradients = torch.autograd.grad(found, list(module.parameters()), upstream)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected, list(other.parameters()), upstream.cpu()), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)
