"""The kernels of the hard selection against the scan in PyTorch: the same keys for the same queries, bit for bit."""

import pytest
import torch

from hf_sparse.ops.selection import thresholds
from hf_sparse.ops.selection.thresholds import ScanPlan
from hf_sparse.ops.selection.triton import scan
from hf_sparse.ops.selection.triton.scan import Selection, launch_selection, select_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
KINDS = ["normal", "ties", "equal", "rising", "falling", "holes", "nothing"]


def expected_selection(scores, size, *, queries, window, tile=128, first=None, sinks=0) -> Selection:
    """Intervals and lists from the floors of the scan in PyTorch; `first` `[B]` for scores `[B, H, T]`."""
    keys = scores.shape[-1]
    position = torch.arange(keys, device=DEVICE)
    first = torch.zeros(1, dtype=torch.long, device=DEVICE) if first is None else first[:, None, None]
    scores = scores.masked_fill(position < first + sinks, -torch.inf)
    options = {"size": size, "queries": queries, "window": window, "tile": tile, "with_lists": True}
    rank, floor, _, lists = thresholds.scan_prefixes(scores, size, **options)
    end = torch.searchsorted(floor, rank, right=True) + keys - queries
    end = torch.maximum(end.masked_fill(rank == 0, 0), position + window)
    end = torch.where(position < first + sinks, keys, end).masked_fill(position < first, 0)
    lists = lists.masked_fill(rank.unsqueeze(-2).expand(*lists.shape[:-1], -1).gather(-1, lists.clamp(min=0)) == 0, -1)
    lists = torch.nn.functional.pad(lists, (0, min(size, keys) - lists.shape[-1]), value=-1)
    tiles = torch.arange(lists.shape[-2], device=DEVICE)[:, None] * tile
    leaves = tiles + torch.arange(tile, device=DEVICE) + keys - queries - window + 1
    stays = (leaves >= (first + sinks).unsqueeze(-1)) & (leaves < keys) & (leaves < leaves[:, :1] + tile - 1)
    there = leaves.clamp(0, keys - 1).expand(*end.shape[:-1], *leaves.shape)
    stays = stays & (end.unsqueeze(-2).expand(*there.shape[:-1], -1).gather(-1, there) > leaves + window)
    leavers = leaves.expand_as(there).masked_fill(~stays, 2 * keys).sort(-1).values
    # Of each query: the keys of its list that it sees, and the leavers before its window.
    last = end.unsqueeze(-2).expand(*lists.shape[:-1], -1).gather(-1, lists.clamp(min=0)).masked_fill(lists < 0, 0)
    sees = last.unsqueeze(-2) > (leaves + window - 1).unsqueeze(-1)
    assert (sees.int().diff(dim=-1) <= 0).all(), "a query does not see the first keys of its list"
    bounds = torch.stack((sees.sum(-1), stays.cumsum(-1) - stays.long()), -2)
    bounds = bounds.masked_fill((tiles + torch.arange(tile, device=DEVICE) >= queries).unsqueeze(-2), -1)  # nobody asks
    return Selection(end.int(), lists.int(), leavers.masked_fill(leavers == 2 * keys, -1).int(), bounds.int())


def assert_same(found: Selection, expected: Selection) -> None:
    assert torch.equal(found.until, expected.until)
    assert torch.equal(found.lists, expected.lists)
    if found.leavers is not None:
        assert torch.equal(found.leavers, expected.leavers)
        assert torch.equal(found.bounds.where(expected.bounds >= 0, -1), expected.bounds)


# keys, queries, window, size, tile
SHAPES = [
    (1, 1, 1, 1, 16),
    (17, 17, 100, 4, 16),  # nothing leaves the window
    (75, 66, 3, 9, 16),
    (100, 3, 20, 16, 16),  # many keys before few queries
    (90, 57, 0, 60, 32),  # a list longer than a chunk
    (340, 340, 2, 5, 16),  # several groups
    (520, 400, 3, 130, 64),
    (300, 300, 1, 7, 256),  # several chunks per tile
    (60, 60, 4, 200, 16),  # more places than keys
    (400, 280, 5, 150, 128),  # chunks as long as they get
]


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys, queries, window, size, tile", SHAPES)
def test_equals_the_scan_in_pytorch(kind, keys, queries, window, size, tile, poisoned_memory, random_scores):
    scores = random_scores(kind, 2, keys).to(DEVICE)
    options = {"queries": queries, "window": window, "tile": tile}
    assert_same(select_keys(scores, size, **options), expected_selection(scores, size, **options))


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [(2, 2), (3, 4), (4, 2)])
def test_levels(kind, groups, monkeypatch, poisoned_memory, random_scores):
    """Groups of groups, more lists than are looked at at a time, and lists of several programs."""
    monkeypatch.setattr(scan, "_GROUPS", groups)
    monkeypatch.setattr(scan, "_MERGING", (16, 2))
    monkeypatch.setattr(scan, "_JOINING", (16, 16, 4))
    scores = random_scores(kind, 1, 430).to(DEVICE)
    # With 430 queries and lists of one program, what joins them also finds who leaves.
    for queries, size in ((390, 11), (390, 70), (430, 11), (430, 70)):
        options = {"queries": queries, "window": 5, "tile": 16}
        assert_same(select_keys(scores, size, **options), expected_selection(scores, size, **options))


@pytest.mark.parametrize("queries", [140, 150])
@pytest.mark.parametrize("kind", ["normal", "ties", "rising", "holes"])
def test_heads_that_reach_different_numbers(kind, queries, poisoned_memory, random_scores):
    """With padding and sinks, whose scores may be anything."""
    scores = random_scores(kind, 2, 3, 150).to(DEVICE)
    first, sinks, sizes = torch.tensor([0, 37], device=DEVICE), 3, (9, 1, 40)
    scores[0, :, :3], scores[1, :, :40] = torch.nan, torch.inf
    counts = torch.tensor([sizes, sizes], dtype=torch.int32, device=DEVICE)
    options = {"queries": queries, "window": 4, "tile": 16}
    found = launch_selection(scores, ScanPlan(40, 40, *options.values(), False, True), first, sinks, counts)
    for head, size in enumerate(sizes):
        expected = expected_selection(scores[:, head : head + 1], size, first=first, sinks=sinks, **options)
        listed = torch.nn.functional.pad(expected.lists, (0, 40 - size), value=-1)
        part = Selection(*(of_heads[:, head] for of_heads in found))
        assert_same(part, Selection(*(of_heads[:, 0] for of_heads in expected._replace(lists=listed))))


def test_infinite_scores_and_no_numbers(poisoned_memory, random_scores):
    """A score of infinity is the best; one that is no number is no candidate."""
    scores = random_scores("normal", 2, 90).to(DEVICE)
    scores[:, 5::7] = torch.inf
    without = scores.clone()
    scores[:, 3::8], without[:, 3::8] = torch.nan, -torch.inf
    options = {"queries": 80, "window": 3, "tile": 16}
    assert_same(select_keys(scores, 20, **options), expected_selection(without, 20, **options))


def test_scores_without_a_tie_and_with_one():
    """A chunk is sorted by its scores alone if they differ; subnormal ones do."""
    order = torch.randperm(64, device=DEVICE).float()
    for scores in (order, order * 1e-45, order.fmod(63)):
        options = {"queries": 64, "window": 2, "tile": 32}
        assert_same(select_keys(scores, 9, **options), expected_selection(scores, 9, **options))


def test_both_zeros_tie():
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0] * 8, device=DEVICE)
    found = select_keys(scores, 2, queries=32, window=1, tile=16)
    assert found.until.tolist() == [32, 32, *range(3, 33)]


@pytest.mark.cross("values")
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("queries, size", [(39_000, 512), (39_000, 3000), (40_011, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_long(kind, queries, size, random_scores):
    scores = random_scores(kind, 2, 3, 40_011).to(DEVICE)
    options = {"queries": queries, "window": 512}
    assert_same(select_keys(scores, size, **options), expected_selection(scores, size, **options))
