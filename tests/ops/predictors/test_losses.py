"""Projection losses against loops and closed-form gradients."""

import pytest
import torch

from hf_sparse.ops.predictors import losses
from hf_sparse.ops.predictors.losses import info_nce, mass_hinge, pair_hinge, sum_hinge

BATCH, HEADS, KV_HEADS, ROWS, KEYS, RANK = 2, 4, 2, 5, 9, 3
HINGES = [pair_hinge, sum_hinge, mass_hinge]


@pytest.fixture
def example():
    """Points, probabilities and allowed pairs; row 0 has no allowed key, row 1 no gold edge, row 2 no other."""
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS, ROWS, RANK, dtype=torch.float64, requires_grad=True)
    key = torch.randn(BATCH, KV_HEADS, KEYS, RANK, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(BATCH, 1, ROWS, KEYS) < 0.8
    allowed[:, :, 3:, :2] = True
    allowed[:, :, 0] = False
    allowed[..., -1] = False
    mass = torch.rand(BATCH, HEADS, ROWS, KEYS, dtype=torch.float64)
    mass[..., 3:, :] *= torch.rand(BATCH, HEADS, 2, KEYS) < 0.4
    mass[..., 3:, 0], mass[..., 3:, 1] = 0.1, 0.0
    mass[:, :, 1] = 0
    mass = mass * allowed
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)
    return query, key, mass, allowed


def distances(query, key):
    return (query[..., None, :] - key.repeat_interleave(HEADS // KV_HEADS, 1)[..., None, :, :]).square().sum(-1)


@pytest.fixture
def drawn(monkeypatch):
    """Makes the draw known: others in the order of their distance from the last key, instead of at random."""

    def rand(shape, generator, device):
        return torch.linspace(0.9, 0.1, shape[-1]).expand(shape)

    monkeypatch.setattr(losses.torch, "rand", rand)

    def pairs(mass, allowed):
        """For each (b, h, row): gold keys, and the other of each."""
        for b in range(BATCH):
            for h in range(HEADS):
                for i in range(ROWS):
                    gold = [j for j in range(KEYS) if mass[b, h, i, j] > 0]
                    spare = [j for j in reversed(range(KEYS)) if allowed[b, 0, i, j] and not mass[b, h, i, j] > 0]
                    if gold and spare:
                        yield b, h, i, gold, [spare[n % len(spare)] for n in range(len(gold))]

    return pairs


@pytest.mark.parametrize("margin", [1.0, 6.0])
def test_hinges(example, drawn, margin, monkeypatch):
    monkeypatch.setattr(losses, "_MARGIN", margin)
    query, key, mass, allowed = example
    d = distances(query, key)
    rows = int(allowed.any(-1).expand(BATCH, HEADS, ROWS).sum())
    expected = dict.fromkeys(HINGES, torch.zeros((), dtype=torch.float64))
    some = 0
    for b, h, i, gold, others in drawn(mass, allowed):
        edge, other = d[b, h, i, gold], d[b, h, i, others]
        hinge = (margin + edge - other).clamp(min=0)
        some += 1
        expected[pair_hinge] = expected[pair_hinge] + hinge.mean() / rows
        expected[mass_hinge] = expected[mass_hinge] + (hinge * mass[b, h, i, gold]).sum() / rows
        expected[sum_hinge] = expected[sum_hinge] + (margin + edge.sum() - other.sum()).clamp(min=0) / rows
    assert 0 < some < rows
    for loss in HINGES:
        found = loss(query, key, mass, allowed)
        torch.testing.assert_close(found, expected[loss])
        for got, wanted in zip(
            torch.autograd.grad(found, (query, key)),
            torch.autograd.grad(expected[loss], (query, key), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


def test_gradient_of_the_sum_hinge_in_closed_form(example, drawn, monkeypatch):
    monkeypatch.setattr(losses, "_MARGIN", 1e3)  # every row is active
    query, key, mass, allowed = example
    rows = int(allowed.any(-1).expand(BATCH, HEADS, ROWS).sum())
    of_query, of_key = torch.zeros_like(query), torch.zeros_like(key)
    with torch.no_grad():
        for b, h, i, gold, others in drawn(mass, allowed):
            keys, q = key[b, h // 2], query[b, h, i]
            of_query[b, h, i] = 2 * (keys[others].sum(0) - keys[gold].sum(0)) / rows
            for positive, negative in zip(gold, others, strict=True):
                of_key[b, h // 2, positive] += -2 * (q - keys[positive]) / rows
                of_key[b, h // 2, negative] += 2 * (q - keys[negative]) / rows
    found = torch.autograd.grad(sum_hinge(query, key, mass, allowed), (query, key))
    torch.testing.assert_close(found[0], of_query)
    torch.testing.assert_close(found[1], of_key)


def test_info_nce(example):
    query, key, mass, allowed = example
    d = distances(query, key)
    rows = int(allowed.any(-1).expand(BATCH, HEADS, ROWS).sum())
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(ROWS):
                among = [j for j in range(KEYS) if allowed[b, 0, i, j]]
                if among:
                    score = (-d[b, h, i, among]).log_softmax(-1)
                    expected = expected - (mass[b, h, i, among] * score).sum() / rows
    found = info_nce(query, key, mass, allowed)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(
        torch.autograd.grad(found, (query, key)), torch.autograd.grad(expected, (query, key)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("loss", [*HINGES, info_nce])
class TestRows:
    def test_without_gold_or_without_others_give_nothing(self, example, loss):
        query, key, mass, allowed = example
        bare = 3 if loss is not info_nce else 2  # rows 0 to 2, or 0 and 1 where others are not needed
        found = loss(query[:, :, :bare], key, mass[:, :, :bare], allowed[:, :, :bare])
        assert found == 0
        assert not any(of.any() for of in torch.autograd.grad(found, (query, key)))

    def test_padding_is_never_touched(self, example, loss):
        """NaN in keys that no row may see and in rows that see nothing changes neither loss nor gradient."""
        query, key, mass, allowed = example

        def run(query, key):
            more = {} if loss is info_nce else {"generator": torch.Generator().manual_seed(0)}
            found = loss(query, key, mass, allowed, **more)
            return found, *torch.autograd.grad(found, (query, key))

        with torch.no_grad():
            bad_query, bad_key = query.clone(), key.clone()
            bad_query[:, :, 0], bad_key[:, :, -1] = torch.nan, torch.nan
        for clean, bad in zip(run(query, key), run(bad_query.requires_grad_(), bad_key.requires_grad_()), strict=True):
            assert torch.equal(clean, bad)

    def test_learns(self, example, loss):
        query, key, mass, allowed = example
        optimiser = torch.optim.Adam([query, key], 0.05)
        start = distances(query, key).detach()
        for step in range(60):
            more = {} if loss is info_nce else {"generator": torch.Generator().manual_seed(step)}
            optimiser.zero_grad()
            loss(query, key, mass, allowed, **more).backward()
            optimiser.step()
        gold, other = (mass > 0)[:, :, 3:], (allowed & (mass == 0))[:, :, 3:]
        gap = [
            float(d[:, :, 3:][other].mean() - d[:, :, 3:][gold].mean()) for d in (start, distances(query, key).detach())
        ]
        assert gap[1] > gap[0] + 0.5


def test_others_are_drawn_evenly_and_only_once():
    """Of 8 others 3 are drawn: the distances of drawn keys are told apart by their value."""
    query, key = torch.zeros(1, 1, 1, 1), torch.arange(12.0).sqrt().view(1, 1, 12, 1)  # squared distance = index
    mass = torch.zeros(1, 1, 1, 12)
    mass[..., :3] = 1 / 3
    allowed = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    allowed[..., 11] = False
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(12)
    for _ in range(2000):
        other = losses._draw(query, key, mass, allowed, generator).other.flatten().round().long()
        assert len(set(other.tolist())) == 3
        seen[other] += 1
    assert not seen[:3].any() and not seen[11]
    assert ((seen[3:11] - 750).abs() < 5 * 750**0.5).all()


def test_bad_input(example):
    query, key, mass, allowed = example
    with pytest.raises(ValueError, match=r"expected probabilities \(2, 4, 5, 9\) .* got \(2, 4, 5, 8\)"):
        sum_hinge(query, key, mass[..., 1:], allowed)
    with pytest.raises(ValueError, match="same rank"):
        mass_hinge(query[..., 1:], key, mass, allowed)
