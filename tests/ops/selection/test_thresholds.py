"""Thresholds of every prefix against one projection per prefix, and against the streaming form."""

import math

import pytest
import torch

from hf_sparse.ops import SparseKStream, sparsek, sparsek_thresholds, topk_thresholds

TILES = [1, 3, 64, 200]


def prefixes(scores: torch.Tensor, support: int | None = None) -> torch.Tensor:
    """`[..., T, T]`: row t holds the scores up to t (the best `support` of them), `-inf` elsewhere."""
    length = scores.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    rows = scores.unsqueeze(-2).masked_fill(~causal, -torch.inf)
    if support is not None:
        order = rows.detach().sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order[..., :support], True)
        rows = rows.masked_fill(~kept, -torch.inf)
    return rows


def gates(scores: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Gates `[..., T, T]` that the thresholds stand for."""
    past = torch.isfinite(prefixes(scores.detach()))
    free = (scores.unsqueeze(-2) - tau.unsqueeze(-1)).clamp(0, 1)
    return torch.where(past, free, 0.0)


KINDS = ["normal", "ties", "equal", "rising", "falling", "hard", "holes"]


@pytest.mark.cross("values")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_give_the_projection_of_every_prefix(kind, tile, random_scores):
    scores = random_scores(kind, 3, 110, dtype=torch.float64)
    for k in (1, 9):
        tau = sparsek_thresholds(scores, k, tile=tile)
        torch.testing.assert_close(gates(scores, tau), sparsek(prefixes(scores), k), rtol=0, atol=1e-12)
        assert (tau.diff(dim=-1).nan_to_num(0) >= 0).all(), "tau fell"
        few = torch.isfinite(scores).cumsum(-1) <= k
        assert torch.equal(tau == -torch.inf, few)


@pytest.mark.cross("values")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", KINDS)
def test_topk_thresholds_select_what_sorting_selects(kind, tile, random_scores):
    k = 7
    scores = random_scores(kind, 2, 100, dtype=torch.float64)
    kappa, index = topk_thresholds(scores, k, tile=tile)
    assert (kappa.diff(dim=-1).nan_to_num(0) >= 0).all(), "kappa fell"
    for row in range(2):
        for t in range(100):
            past = [(float(z), -i) for i, z in enumerate(scores[row, : t + 1]) if z > -math.inf]
            best = sorted(past, reverse=True)[:k]
            if len(best) < k:
                assert kappa[row, t] == -math.inf and index[row, t] == -1
            else:
                assert (float(kappa[row, t]), -int(index[row, t])) == best[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_stream(kind, random_scores):
    scores = random_scores(kind, 400, dtype=torch.float64)
    for k in (1, 6, 50):
        stream = SparseKStream(k)
        pushed = [(stream.push(float(z)), stream.kappa) for z in scores]
        tau, kappa = torch.tensor(pushed, dtype=torch.float64).T
        torch.testing.assert_close(sparsek_thresholds(scores, k), tau, rtol=0, atol=1e-11)
        assert torch.equal(topk_thresholds(scores, k)[0], kappa)


@pytest.mark.full
def test_a_hundred_thousand_steps_equal_the_stream():
    scores = torch.randn(100_000, dtype=torch.float64)
    stream = SparseKStream(64)
    pushed = [(stream.push(z), stream.kappa) for z in scores.tolist()]
    tau, kappa = torch.tensor(pushed, dtype=torch.float64).T
    torch.testing.assert_close(sparsek_thresholds(scores, 64), tau, rtol=0, atol=1e-10)
    assert (tau.diff()[64:] >= 0).all()
    assert torch.equal(topk_thresholds(scores, 64)[0], kappa)


def test_stream_state_is_the_support():
    stream = SparseKStream(4)
    scores = torch.randn(300, dtype=torch.float64)
    for t, z in enumerate(scores.tolist()):
        stream.push(z)
        expected = sparsek(scores[: t + 1], 4)
        assert stream.support == int((expected > 0).sum())
        assert stream.count == t + 1
        if t % 50 == 0:
            seen = torch.tensor([stream.gate(old) for old in scores[: t + 1].tolist()], dtype=torch.float64)
            torch.testing.assert_close(seen, expected, rtol=0, atol=1e-12)


def test_stream_refuses_nan_and_bad_k():
    with pytest.raises(ValueError, match="expected a score that is a number, got NaN"):
        SparseKStream(1).push(math.nan)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        SparseKStream(0)


@pytest.mark.cross("values")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", ["normal", "rising", "falling", "hard", "holes", "ties", "equal"])
@pytest.mark.parametrize("support", [None, 12])
def test_gradient_equals_the_dense_construction(kind, tile, support, random_scores):
    k = 6
    scores = random_scores(kind, 2, 100, dtype=torch.float64)
    upstream = torch.randn(2, 100, 100, dtype=torch.float64)
    ours, dense = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    inside = torch.isfinite(prefixes(scores, support))
    tau = sparsek_thresholds(ours, k, support=support, tile=tile)
    # Of the clamp only the strictly free entries may pass a gradient; torch's clamp passes one at the ends, too.
    free = inside & (ours.unsqueeze(-2) > tau.unsqueeze(-1)) & (ours.unsqueeze(-2) - 1 < tau.unsqueeze(-1))
    difference = ours.unsqueeze(-2) - tau.unsqueeze(-1).masked_fill(tau.unsqueeze(-1) == -torch.inf, 0.0)
    torch.where(free, difference, 0.0).mul(upstream).sum().backward()
    sparsek(prefixes(dense, support), k).mul(upstream).sum().backward()
    torch.testing.assert_close(ours.grad, dense.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("support", [None, 8])
def test_gradcheck(support):
    scores = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    # Where every gate is 0 or 1, the gradient of tau is 0 by definition: it changes no gate.
    some_free = ((sparsek(prefixes(scores.detach(), support), 4) % 1) > 0).any(-1)
    assert some_free[..., 4:].float().mean() > 0.9

    def finite(z):
        return sparsek_thresholds(z, 4, support=support, tile=16)[some_free]

    assert torch.autograd.gradcheck(finite, (scores,), eps=1e-7, atol=1e-6)


@pytest.mark.cross("values")
@pytest.mark.parametrize("tile", [1, 5, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_support_bounds_the_projection_to_the_best(kind, tile, random_scores):
    k, support = 5, 11
    scores = random_scores(kind, 2, 120, dtype=torch.float64)
    tau = sparsek_thresholds(scores, k, support=support, tile=tile)
    inside = torch.isfinite(prefixes(scores, support))
    bounded = torch.where(inside, gates(scores, tau), 0.0)
    torch.testing.assert_close(bounded, sparsek(prefixes(scores, support), k), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        sparsek_thresholds(scores, k, support=10_000), sparsek_thresholds(scores, k), rtol=0, atol=1e-12
    )


def test_float32_and_leading_dimensions():
    scores = torch.randn(2, 3, 4, 90)
    tau = sparsek_thresholds(scores, 7)
    assert tau.dtype == torch.float32 and tau.shape == scores.shape
    torch.testing.assert_close(tau, sparsek_thresholds(scores.double(), 7).float(), rtol=0, atol=1e-6)
    assert torch.equal(tau[1, 2, 3], sparsek_thresholds(scores[1, 2, 3], 7))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
def test_empty(shape):
    scores = torch.randn(shape, requires_grad=True)
    assert sparsek_thresholds(scores, 3).shape == shape
    assert [t.shape for t in topk_thresholds(scores, 3)] == [shape, shape]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sparsek_thresholds(torch.randn(4), 0)
    with pytest.raises(ValueError, match="k must be at least 1, got -1"):
        topk_thresholds(torch.randn(4), -1)
    with pytest.raises(ValueError, match="support must be at least k = 3, got 2"):
        sparsek_thresholds(torch.randn(4), 3, support=2)


@pytest.mark.parametrize("support", [None, 64])
def test_no_buffer_of_length_times_length(support, largest_tensor):
    length = 4096
    scores = torch.randn(1, length, requires_grad=True)
    with largest_tensor() as largest:
        sparsek_thresholds(scores, 16, support=support)[:, 16:].sum().backward()
        topk_thresholds(scores, 16)
    assert scores.grad is not None
    assert largest.numel < length * length / 64


def returns(kept: torch.Tensor) -> int:
    """How often a key enters `[T, T]` (query, key) again after it had been out; its arrival does not count."""
    arrived = torch.ones_like(kept).tril(-1)
    return int((kept[1:] & ~kept[:-1] & arrived[1:]).sum())


STEPS = 1_500


@pytest.mark.parametrize("slope", [0.0, 1e-3])
def test_a_key_that_falls_out_never_returns(slope):
    scores = torch.randn(STEPS, dtype=torch.float64) + slope * torch.arange(STEPS)
    past = torch.ones(STEPS, STEPS, dtype=torch.bool).tril()
    kappa, index = topk_thresholds(scores, 32)
    below = (scores < kappa[:, None]) | ((scores == kappa[:, None]) & (torch.arange(STEPS) > index[:, None]))
    assert returns(past & ~below) == 0
    assert returns(past & (scores > sparsek_thresholds(scores, 32)[:, None])) == 0


def test_a_slope_normalised_by_the_length_breaks_that():
    """The test above can fail: with scores that are not frozen, keys do return."""
    position, step = torch.arange(STEPS), torch.arange(1, STEPS + 1)
    moving = torch.randn(STEPS, dtype=torch.float64) + 3 * position / step[:, None]
    past = torch.ones(STEPS, STEPS, dtype=torch.bool).tril()
    best = moving.masked_fill(~past, -torch.inf).topk(32, dim=-1).indices
    kept = torch.zeros(STEPS, STEPS, dtype=torch.bool).scatter_(-1, best, True) & past
    assert returns(kept) > 0
