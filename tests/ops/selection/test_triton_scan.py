"""The scan's kernels against the scan in PyTorch: the same keys, the same thresholds, the same gradient."""

import pytest
import torch

from hf_sparse.ops import sparsek, topk_thresholds
from hf_sparse.ops.selection import thresholds
from hf_sparse.ops.selection.triton.scan import scan_prefixes, supports

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
KINDS = ["normal", "ties", "equal", "rising", "falling", "hard", "holes"]


def by_index(found: thresholds.Scan) -> torch.Tensor:
    """Floors as indices of keys, -1 for none: ranks may be any integers."""
    same = (found.rank.unsqueeze(-2) == found.floor.unsqueeze(-1)) & (found.rank > 0).unsqueeze(-2)
    return torch.where(same.any(-1), same.int().argmax(-1), -1)


def assert_same(ours: thresholds.Scan, theirs: thresholds.Scan) -> None:
    assert torch.equal(ours.rank.argsort(dim=-1, stable=True), theirs.rank.argsort(dim=-1, stable=True))
    assert torch.equal(ours.rank > 0, theirs.rank > 0)
    assert torch.equal(by_index(ours), by_index(theirs))
    assert ours.lists.shape[:-1] == theirs.lists.shape[:-1]
    width = theirs.lists.shape[-1]
    rank = theirs.rank.unsqueeze(-2).expand(*theirs.lists.shape[:-1], -1)  # PyTorch also lists keys without a rank
    expected = theirs.lists.masked_fill(rank.gather(-1, theirs.lists.clamp(min=0)) == 0, -1)
    assert torch.equal(ours.lists[..., :width].long(), expected)
    assert (ours.lists[..., width:] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_scan_in_pytorch(kind, random_scores):
    scores = random_scores(kind, 75).to(DEVICE)
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    options = {"k": 4, "size": 9, "queries": 66, "window": 3, "tile": 16, "with_lists": True}
    found, expected = scan_prefixes(ours, **options), thresholds.scan_prefixes(theirs, with_tau=True, **options)
    assert_same(found, expected)
    torch.testing.assert_close(found.tau, expected.tau.float(), rtol=1e-6, atol=1e-7)
    assert (found.tau.diff(dim=-1).nan_to_num(0) >= 0).all(), "tau fell"
    some = expected.tau.isfinite()
    assert some.any()
    upstream = torch.randn(66, device=DEVICE) * some
    for tau in (found.tau, expected.tau):
        (tau.masked_fill(~some, 0.0) * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


# keys, queries, window, size, tile
SHAPES = [
    (1, 1, 1, 1, 16),
    (17, 17, 100, 4, 16),  # nothing leaves the window
    (100, 3, 20, 16, 16),  # many keys before few queries
    (90, 57, 0, 60, 32),  # a list longer than a chunk
    (340, 340, 2, 5, 16),  # several blocks
    (600, 600, 2, 5, 16),  # two levels of lists
    (520, 400, 3, 130, 64),
    (300, 300, 1, 7, 256),  # several chunks per tile
]


@pytest.mark.parametrize("keys, queries, window, size, tile", SHAPES)
def test_shapes(keys, queries, window, size, tile, random_scores):
    scores = random_scores("ties", 1, 2, keys).to(DEVICE)
    options = {"k": 1, "size": size, "queries": queries, "window": window, "tile": tile, "with_lists": True}
    assert_same(scan_prefixes(scores, **options), thresholds.scan_prefixes(scores, **options))


def test_support_as_large_as_the_text_is_exact(random_scores):
    scores = random_scores("normal", 50).to(DEVICE)
    tau = scan_prefixes(scores, 5, size=50, queries=50, window=0, tile=16).tau
    for t in (5, 20, 49):
        gates = (scores[: t + 1] - tau[t]).clamp(0, 1)
        torch.testing.assert_close(gates, sparsek(scores[: t + 1], 5), rtol=0, atol=1e-6)


def test_both_zeros_tie():
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0] * 8, device=DEVICE)
    found = scan_prefixes(scores, 2, size=2, queries=32, window=0, tile=16)
    assert by_index(found).tolist() == [-1, *[1] * 31]


def test_nothing_is_left_unwritten(poisoned_memory, random_scores):
    scores = random_scores("holes", 2, 150).to(DEVICE)
    options = {"k": 2, "size": 40, "queries": 140, "window": 4, "tile": 16, "with_lists": True}
    assert_same(scan_prefixes(scores, **options), thresholds.scan_prefixes(scores, **options))


def test_what_the_kernels_do_not_take_goes_the_other_way():
    scores = torch.randn(40, dtype=torch.float64, device=DEVICE)
    assert not supports(scores, size=3, queries=40, tile=16)
    kappa, _ = topk_thresholds(scores, 3)
    found = scan_prefixes(scores, 3, size=3, queries=40, window=0, tile=16)
    selected = (found.rank >= found.floor.unsqueeze(-1)) & (found.rank > 0)
    past = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).tril()
    assert torch.equal(selected & past, (scores >= kappa.unsqueeze(-1)) & past)
    assert not supports(scores.float(), size=3, queries=40, tile=24)
    assert not supports(scores.float(), size=10_000, queries=40, tile=16)
    assert supports(scores.float(), size=3, queries=40, tile=384)


@pytest.mark.cross("values")
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("size", [512, 2048])
@pytest.mark.parametrize("kind", ["normal", "ties", "rising"])
def test_long(kind, size, random_scores):
    scores = random_scores(kind, 2, 3, 20_011).to(DEVICE)
    options = {"k": 512, "size": size, "queries": 19_000, "window": 512, "with_lists": True}
    found, expected = scan_prefixes(scores, **options), thresholds.scan_prefixes(scores, with_tau=True, **options)
    places = [torch.searchsorted(one.rank.sort(-1).values, one.floor) for one in (found, expected)]
    assert torch.equal(*places)
    assert torch.equal(found.lists.long(), expected.lists)
    torch.testing.assert_close(found.tau, expected.tau.float(), rtol=1e-6, atol=1e-6)
