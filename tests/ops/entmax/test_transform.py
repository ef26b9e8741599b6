"""alpha-entmax of rows: against bisection in float64, finite differences, and with nothing to choose from."""

import pytest
import torch
from entmax import entmax_bisect
from torch.autograd import gradcheck

from hf_sparse.ops.entmax import entmax
from hf_sparse.ops.entmax.threshold import distribution, relative_threshold

ALPHAS = (1.01, 1.2, 1.5, 1.75, 2.0)


def logits(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_bisection_in_float64(alpha, scale):
    x = logits(64, 300, scale=scale)
    expected = entmax_bisect(x, alpha, n_iter=80)
    torch.testing.assert_close(entmax(x, alpha), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(distribution(x * (alpha - 1), 1 / (alpha - 1)), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
def test_float32_has_its_digits(alpha, scale):
    x = logits(16, 4096, scale=scale).float()
    expected = entmax_bisect(x.double(), alpha, n_iter=80)
    rounding = 1e-7 * scale  # of alpha - 1 times the logits, which is all that a wide row of logits loses
    for ours in (entmax(x, alpha), distribution(x * (alpha - 1), 1 / (alpha - 1))):
        assert ours.dtype == torch.float32
        assert float((ours - expected).abs().sum(-1).max()) < 4e-6 + 10 * rounding


def test_the_threshold_is_found_from_below():
    """Every of Newton's iterates is a lower bound, the last one to the precision of the dtype."""
    z = logits(500, 64) * 0.5
    z = z - z.amax(-1, keepdim=True)
    tau = relative_threshold(z, 2.0)
    assert float(((z - tau).clamp(min=0).square().sum(-1) - 1).abs().max()) < 1e-13
    some = relative_threshold(z.masked_fill((torch.arange(64) % 3 == 1) & (z < 0), -torch.inf), 2.0)
    assert bool((some <= tau + 1e-15).all())


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_equal_logits_share_equally(count):
    x = torch.full((count,), 7.0)
    for alpha in ALPHAS:
        torch.testing.assert_close(entmax(x, alpha), torch.full((count,), 1 / count))
        torch.testing.assert_close(distribution(x * (alpha - 1), 1 / (alpha - 1)), torch.full((count,), 1 / count))


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, torch.tensor([[1.3], [1.9], [1.5]], dtype=torch.float64)])
def test_masked_entries_do_not_exist(alpha):
    x = logits(3, 12)
    gone = torch.arange(12) % 4 == 2
    expected = entmax(x[:, ~gone], alpha)
    result = entmax(x.masked_fill(gone, -torch.inf), alpha)
    torch.testing.assert_close(result[:, ~gone], expected)
    assert bool((result[:, gone] == 0).all())


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, "tensor"])
def test_a_row_of_nothing_is_zeros_without_gradient(alpha):
    alpha = torch.tensor(1.5, requires_grad=True) if alpha == "tensor" else alpha
    x = torch.tensor([[-torch.inf] * 3, [0.5, 0.0, -torch.inf]], requires_grad=True)
    result = entmax(x, alpha)
    (result * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert result[0].tolist() == [0, 0, 0] and result[1].sum().item() == pytest.approx(1)
    assert x.grad[0].tolist() == [0, 0, 0] and x.grad[1, 0] != 0
    if isinstance(alpha, torch.Tensor):
        assert torch.isfinite(alpha.grad)
    assert distribution(torch.full((1, 3), -torch.inf), 2.0).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_gradient_in_the_logits(alpha):
    assert gradcheck(lambda x: entmax(x, alpha, dim=1), logits(4, 7, 2).requires_grad_(), atol=1e-6)


def test_gradient_in_alpha():
    alpha = torch.tensor([[1.2], [1.5], [1.8]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, a: entmax(x, a), (logits(3, 9).requires_grad_(), alpha), atol=1e-6)


def test_half_precision_is_computed_in_float32():
    x = logits(4, 50).to(torch.bfloat16)
    assert torch.equal(entmax(x, 1.5), entmax(x.float(), 1.5).to(torch.bfloat16))


@pytest.mark.parametrize("alpha", [1.0, 2.1, float("nan"), torch.tensor([1.5, 0.9])])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(1, 2\]"):
        entmax(torch.zeros(2, 2), alpha)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        entmax(torch.zeros(2, 2, dtype=torch.int64), 1.5)
    with pytest.raises(ValueError, match=r"broadcast with logits \(2, 3\).*got \(3,\)"):
        entmax(torch.zeros(2, 3), torch.full((3,), 1.5))
    assert entmax(torch.zeros(0, 3), 1.5).shape == (0, 3)
