import pytest
import torch
import torch.nn.functional as F

from hf_sparse.methods.sparsek.selection import POLICIES, random, recency
from hf_sparse.ops import sparsek_attention


@pytest.mark.parametrize("name", ["recency", "random"])
def test_scores_are_float32_and_finite(name):
    scores = POLICIES[name](torch.arange(20).expand(3, -1), 2, 5)
    assert scores.shape == (3, 2, 20) and scores.dtype == torch.float32 and torch.isfinite(scores).all()


def test_recency_is_a_wider_window():
    q, k, v = torch.randn(3, 1, 2, 60, 4)
    scores = recency(torch.arange(60)[None], 2, 0)
    t, j = torch.arange(60)[:, None], torch.arange(60)
    mask = (j <= t) & ((j > t - 12) | (j < 3))
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    output = sparsek_attention(q, k, v, scores, k=7, window=5, sinks=3)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [recency, random])
def test_a_score_depends_on_the_position_alone(policy):
    """So it is frozen on arrival, and the same in one pass, in chunks, in a padded row and while decoding."""
    whole = policy(torch.arange(1000)[None], 3, 4)
    parts = [policy(torch.arange(a, b)[None], 3, 4) for a, b in ((0, 1), (1, 400), (400, 1000))]
    assert torch.equal(torch.cat(parts, -1), whole)
    rows = policy(torch.stack([torch.arange(10), torch.arange(90, 100)]), 3, 4)
    assert torch.equal(rows[1], whole[0, :, 90:100])


def test_random_differs_between_layers_heads_and_positions():
    scores = torch.stack([random(torch.arange(500)[None], 4, layer)[0] for layer in range(6)])
    assert scores.unique().numel() > 0.99 * scores.numel()
    rows = scores.flatten(0, 1)
    rows = rows - rows.mean(-1, keepdim=True)
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 500**0.5


@pytest.mark.parametrize("first", [0, 10_000_000])
def test_random_is_uniform(first):
    scores = random(torch.arange(first, first + 20_000)[None], 2, 7).flatten().double().sort().values
    uniform = torch.linspace(0, 1, scores.numel(), dtype=torch.float64)
    assert (scores - uniform).abs().max() < 2 / scores.numel() ** 0.5  # Kolmogorov-Smirnov, far out
