"""SparseK against an independent implementation (entmax's bisection) and against its defining properties."""

import pytest
import torch
from entmax import budget_bisect

from hf_sparse.ops import sparsek

ITERATIONS = 60  # of the bisection: down to the last bits of float64
SCALES = [0.05, 0.3, 1.0, 3.0, 10.0]


def oracle(scores: torch.Tensor, k: int, dim: int = -1) -> torch.Tensor:
    return budget_bisect(scores.double(), budget=float(k), dim=dim, n_iter=ITERATIONS)


@pytest.mark.cross("values")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("length", [2, 3, 7, 16, 33, 59])
def test_equals_bisection_for_every_k(length, scale):
    scores = torch.randn(4, 3, length, dtype=torch.float64) * scale + 5 * torch.randn(4, 3, 1, dtype=torch.float64)
    budgets = torch.arange(1.0, length, dtype=torch.float64)
    expected = budget_bisect(
        scores.expand(length - 1, -1, -1, -1), budget=budgets.view(-1, 1, 1, 1), dim=-1, n_iter=ITERATIONS
    )
    for k in range(1, length):
        torch.testing.assert_close(sparsek(scores, k), expected[k - 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("dim", [-1, 1])
def test_each_row_has_its_own_sum(dim):
    scores = torch.randn(6, 11, 11, dtype=torch.float64, requires_grad=True)
    k = torch.randint(1, 14, (6, 11))
    gates = sparsek(scores, k, dim=dim)
    alone = [
        [sparsek(row, int(n)) for row, n in zip(*pair, strict=True)]
        for pair in zip(scores.movedim(dim, -1), k, strict=True)
    ]
    expected = torch.stack([torch.stack(rows) for rows in alone]).movedim(-1, dim)
    torch.testing.assert_close(gates, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(gates)
    (found,), (wanted,) = (torch.autograd.grad(one, scores, grad, retain_graph=True) for one in (gates, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape, dim", [((5, 9), 0), ((4, 9, 3), 1), ((4, 9, 3), -2), ((9, 2, 3, 2), -4), ((9,), 0)])
def test_projects_along_any_dimension(shape, dim):
    scores = torch.randn(shape, dtype=torch.float64)
    gates = sparsek(scores, 2, dim=dim)
    assert gates.shape == scores.shape
    expected = oracle(scores.movedim(dim, -1), 2).movedim(-1, dim)
    torch.testing.assert_close(gates, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", SCALES)
def test_long_float32_rows(scale):
    scores = torch.randn(3, 4096) * scale
    torch.testing.assert_close(sparsek(scores, 100), oracle(scores, 100).float(), rtol=0, atol=2e-6 * max(1, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    scores = torch.randn(5, 200).to(dtype)
    gates = sparsek(scores, 20)
    assert gates.dtype == dtype
    assert torch.equal(gates, sparsek(scores.float(), 20).to(dtype))
    torch.testing.assert_close(gates.double(), oracle(scores, 20), rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("k", [1, 5, 31])
def test_gates_are_in_the_capped_simplex(k, scale):
    scores = torch.randn(20, 32, dtype=torch.float64) * scale
    gates = sparsek(scores, k)
    assert gates.min() >= 0 and gates.max() <= 1
    torch.testing.assert_close(gates.sum(-1), torch.full((20,), float(k), dtype=torch.float64), rtol=0, atol=1e-9)
    saturated, support = (gates == 1).sum(-1), (gates > 0).sum(-1)
    assert (saturated <= k).all() and (support >= k).all()
    assert (gates.gather(-1, scores.topk(k).indices) > 0).all(), "a top-k entry is outside the support"


def test_excluded_entries_get_exactly_zero():
    scores = torch.randn(6, 40, dtype=torch.float64)
    excluded = torch.rand(6, 40) < 0.5
    gates = sparsek(scores.masked_fill(excluded, -torch.inf), 5)
    assert (gates[excluded] == 0).all()
    for row in range(6):
        kept = ~excluded[row]
        torch.testing.assert_close(gates[row, kept], oracle(scores[row, kept], 5), rtol=0, atol=1e-11)


@pytest.mark.parametrize("finite", [0, 1, 3, 4])
def test_no_more_than_k_finite_scores_all_get_one(finite):
    scores = torch.full((2, 9), -torch.inf)
    scores[:, 5 : 5 + finite] = torch.randn(2, finite) * 10
    assert torch.equal(sparsek(scores, 4), torch.isfinite(scores).float())


def test_k_of_the_length_and_beyond_gives_ones():
    scores = torch.randn(3, 7)
    assert torch.equal(sparsek(scores, 7), torch.ones(3, 7))
    assert torch.equal(sparsek(scores, 100), torch.ones(3, 7))


@pytest.mark.parametrize("value", [0.0, -3.5, 1e6])
def test_equal_scores_share_the_budget(value):
    gates = sparsek(torch.full((2, 12), value), 3)
    assert torch.equal(gates, torch.full((2, 12), 0.25))


@pytest.mark.parametrize("gap", [1.0, 1.5, 20.0])
def test_a_gap_of_one_gives_hard_topk(gap):
    scores = torch.randn(30, 40, dtype=torch.float64).sort(-1, descending=True).values
    scores[:, 7:] -= gap - (scores[:, 6:7] - scores[:, 7:8])  # the gap between the 7th and the 8th
    shuffle = torch.rand(30, 40).argsort(-1)
    gates = sparsek(scores.gather(-1, shuffle), 7)
    torch.testing.assert_close(gates, (shuffle < 7).double(), rtol=0, atol=1e-14)


def test_shift_invariance():
    scores = torch.randn(5, 50, dtype=torch.float64)
    torch.testing.assert_close(sparsek(scores + 1000, 9), sparsek(scores, 9), rtol=0, atol=1e-12)


def test_a_far_outlier_costs_the_others_no_digits():
    scores = torch.randn(50, dtype=torch.float64)
    outlier = torch.cat([scores, scores.new_tensor([1e7])])
    torch.testing.assert_close(sparsek(outlier, 6)[:-1], sparsek(scores, 5), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "offset, scale", [(1e4, 1), (1e6, 1), (-1e6, 1), (1e7, 1), (0, 1e4), (0, 1e6), (0, 1e8), (0, 1e12), (1e7, 1e3)]
)
def test_large_scores_keep_the_sum_of_the_gates(offset, scale):
    k = 188
    scores = torch.randn(4, 2048) * scale + offset
    gates = sparsek(scores, k)
    exact = sparsek(scores.double(), k)
    torch.testing.assert_close(
        gates.double().sum(-1), torch.full((4,), float(k), dtype=torch.float64), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(gates.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal((gates > 0) & (gates < 1), (exact > 0) & (exact < 1)), "the gradient reaches other entries"


@pytest.mark.parametrize("offset", [1e12, 1e15])
def test_large_float64_scores_keep_the_sum_of_the_gates(offset):
    scores = torch.randn(4, 2048, dtype=torch.float64) * 100 + offset
    gates = sparsek(scores, 188)
    torch.testing.assert_close(gates.sum(-1), torch.full((4,), 188.0, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("slope", [0.01, 0.1, 1.0, 10.0])
def test_scores_that_rise_with_the_position_keep_the_sum_of_the_gates(slope):
    gates = sparsek(slope * torch.arange(100_000.0) + torch.randn(2, 100_000), 188)
    torch.testing.assert_close(gates.double().sum(-1), torch.full((2,), 188.0, dtype=torch.float64), rtol=0, atol=1e-4)


def test_k_1_is_sparsemax():
    from entmax import sparsemax

    scores = torch.randn(10, 30, dtype=torch.float64)
    torch.testing.assert_close(sparsek(scores, 1), sparsemax(scores, dim=-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape, dim", [((0,), 0), ((3, 0), -1), ((0, 3), -1), ((2, 0, 4), 1)])
def test_empty(shape, dim):
    scores = torch.randn(shape, requires_grad=True)
    gates = sparsek(scores, 2, dim=dim)
    assert gates.shape == shape
    gates.sum().backward()
    assert scores.grad is not None and scores.grad.shape == shape


@pytest.mark.cross("values")
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("scale", SCALES)
def test_gradient_equals_finite_differences(k, scale):
    # Random scores lie on a breakpoint with probability 0; gradcheck's step of 1e-6 could still cross one.
    scores = (torch.randn(4, 12, dtype=torch.float64) * scale).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sparsek(z, k), (scores,), eps=1e-7, atol=1e-6)


def test_gradient_equals_the_gradient_of_the_bisection():
    scores = torch.randn(10, 40, dtype=torch.float64)
    upstream = torch.randn_like(scores)
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    sparsek(ours, 6).backward(upstream)
    oracle(theirs, 6).backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11)


def test_gradient_rows_sum_to_zero_and_vanish_off_the_free_entries():
    scores = torch.randn(20, 60, dtype=torch.float64, requires_grad=True)
    gates = sparsek(scores, 12)
    gates.backward(torch.randn_like(gates))
    assert scores.grad is not None
    free = (gates > 0) & (gates < 1)
    assert free.any() and (gates == 1).any() and (gates == 0).any()
    assert (scores.grad[~free] == 0).all()
    assert (scores.grad[free] != 0).all()
    assert scores.grad.sum(-1).abs().max() < 1e-12


def test_gradient_of_everything_selected_is_zero():
    scores = torch.tensor([[1.0, 2.0, -torch.inf, 3.0]], requires_grad=True)
    sparsek(scores, 3).backward(torch.randn(1, 4))
    assert torch.equal(scores.grad, torch.zeros(1, 4))


def test_a_second_derivative_is_refused():
    scores = torch.randn(8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((sparsek(scores, 3) ** 2).sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("k", [0, -2])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        sparsek(torch.randn(4), k)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_scores_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(ValueError, match=f"scores must be floating point, got {dtype}"):
        sparsek(torch.ones(4, dtype=dtype), 1)
