"""Metrics against loops over pairs."""

import math

import pytest
import torch

from hf_sparse.ops.predictors.metrics import MetricMeans, graph_metrics, tile_sparsity
from hf_sparse.ops.tiles.tiles import Tiles

BATCH, HEADS, KEYS = 4, 4, 13


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gold(rows: int, position: list[int], causal: bool) -> torch.Tensor:
    """Random rows that sum to 1, with zeros, over allowed keys."""
    mass = torch.rand(BATCH, HEADS, rows, KEYS) * (torch.rand(BATCH, HEADS, rows, KEYS) < 0.5)
    mass += 1e-3 * torch.eye(KEYS)[position]  # every row has an edge
    if causal:
        mass *= torch.arange(KEYS) <= torch.tensor(position)[:, None]
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sampled", [None, [11, 2, 7], "last"])
@pytest.mark.parametrize("heads", [HEADS, 2, 1])
def test_graph_metrics(causal, sampled, heads):
    position = list(range(KEYS)) if sampled is None else [9, 10, 11, 12] if sampled == "last" else sampled
    mass = gold(len(position), position, causal)
    edges = torch.rand(BATCH, heads, len(position), KEYS) < 0.6
    given = torch.tensor(position) if isinstance(sampled, list) else None
    found = graph_metrics(edges, mass, causal=causal, position=given)
    for b in range(BATCH):
        for h in range(HEADS):
            pairs = predicted = truly = both = rows = exact = 0
            covered = whole = 0.0
            for row, i in enumerate(position):
                missed = False
                for j in range(KEYS):
                    if causal and j > i:
                        continue
                    p, edge = float(mass[b, h, row, j]), bool(edges[b, h // (HEADS // heads), row, j])
                    pairs, predicted, truly, both = (
                        pairs + 1,
                        predicted + edge,
                        truly + (p > 0),
                        both + (edge and p > 0),
                    )
                    covered, whole = covered + p * edge, whole + p
                    missed = missed or (p > 0 and not edge)
                rows, exact = rows + 1, exact + (not missed)
            expected = {
                "sparsity": 1 - predicted / pairs,
                "gold_sparsity": 1 - truly / pairs,
                "recall": both / truly,
                "mass_recall": covered / whole,
                "exact_rows": exact / rows,
                "precision": both / predicted,
            }
            assert {name: float(of[b, h]) for name, of in found.items()} == pytest.approx(expected, abs=1e-6)


def test_a_superset_is_exact_and_rows_without_gold_count_nothing():
    mass = gold(KEYS, list(range(KEYS)), True)
    mass[3] = 0
    found = graph_metrics(mass > 0, mass, causal=True)
    for name in ("recall", "mass_recall", "exact_rows", "precision"):
        assert (found[name][:3] == 1).all() and found[name][3].isnan().all()
    assert torch.equal(found["sparsity"], found["gold_sparsity"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("listed, rows", [(4, 4), (1, 4), (11, 1), (6, 2)])
def test_tile_sparsity(causal, listed, rows):
    size = 4
    mask = torch.rand(BATCH, 2, listed, 4) < 0.5
    found = tile_sparsity(Tiles.of_mask(mask, size, rows), KEYS, causal=causal)
    for b in range(BATCH):
        for h in range(2):
            kept = allowed = 0
            for row in range(listed):
                at = (-(-KEYS // rows) - listed + row) * rows // size
                for column in range(4):
                    if column <= at or not causal:
                        allowed, kept = allowed + 1, kept + bool(mask[b, h, row, column])
            assert float(found[b, h]) == pytest.approx(1 - kept / allowed)


def test_means_weigh_texts_equally_and_leave_out_what_is_not_there():
    means = MetricMeans()
    means.add({"recall": torch.tensor([[0.5, 1.0], [math.nan, 0.0]])})
    means.add({"recall": torch.tensor([[0.3, 0.2]])})
    assert means.per_head()["recall"].tolist() == pytest.approx([0.4, 0.4])
    means.add({"recall": torch.tensor([[1.0, math.nan]])})
    assert means.mean()["recall"] == pytest.approx((0.6 + 0.4) / 2)


def test_bad_input():
    mass = torch.rand(1, 4, 3, 5)
    with pytest.raises(ValueError, match=r"edges \[B, H, 3, 5\] bool with H a divisor of 4, got \(1, 3, 3, 5\)"):
        graph_metrics(torch.ones(1, 3, 3, 5, dtype=torch.bool), mass, causal=True)
    with pytest.raises(ValueError, match=r"got \(1, 4, 3, 5\) torch.float32"):
        graph_metrics(mass, mass, causal=True)
    with pytest.raises(ValueError, match=r"positions of 3 rows, got \(2,\)"):
        graph_metrics(mass > 0, mass, causal=True, position=torch.arange(2))
