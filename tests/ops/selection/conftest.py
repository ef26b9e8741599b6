"""Scores to select keys by."""

import pytest
import torch


def _random_scores(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    scores = torch.randn(shape, dtype=dtype)
    if kind == "ties":
        return scores.mul(2).round() / 2  # of both signs of zero, too
    if kind == "equal":
        return torch.zeros_like(scores)
    if kind == "rising":
        return scores + torch.arange(shape[-1]) * 0.05
    if kind == "falling":
        return scores - torch.arange(shape[-1]) * 0.05
    if kind == "hard":
        return scores * 30
    if kind == "holes":
        return scores.masked_fill(torch.rand(shape) < 0.4, -torch.inf)
    if kind == "nothing":
        return torch.full_like(scores, -torch.inf)
    assert kind == "normal"
    return scores


@pytest.fixture
def random_scores():
    """Draws scores of a kind and a shape on the CPU."""
    return _random_scores
