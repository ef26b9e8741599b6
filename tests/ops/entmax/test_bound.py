"""The page bound: it bounds, what it certifies is so, what it completes is exact, and it predicts as its rule says."""

import pytest
import torch
from torch import Tensor

from hf_sparse.ops.entmax import (
    blocks,
    bound_scores,
    bound_tiles,
    certified_entmax_attention,
    complete_tiles,
    entmax_attention,
    predict,
    support,
)
from hf_sparse.ops.entmax.bound import tile_extremes
from hf_sparse.ops.tiles.tiles import Tiles, own_tiles, tile_counts, window_and_global

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZE = 16


def draw(kind: str, batch: int, heads: int, kv_heads: int, length: int, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Float32 queries and keys; the keys of a tile are alike in all but the first kind."""
    query = torch.randn(batch, heads, length, dim)
    key = torch.randn(batch, kv_heads, length, dim)
    if kind == "independent":
        return query * 3, key
    place = torch.arange(length) // SIZE
    centre = torch.randn(batch, kv_heads, length // SIZE + 1, dim)[:, :, place]
    if kind == "far from zero":
        return query + 20, centre * 3 + 0.1 * key - 20
    if kind == "heavy tails":
        return query / torch.rand(batch, heads, length, 1).sqrt(), centre * 2 + 0.2 * key
    if kind == "equal keys":
        return query * 2, centre
    # Queries that look for the topic of their own tile.
    return centre.repeat_interleave(heads // kv_heads, 1) + 0.3 * query, centre * 2 + 0.2 * key


def padding(kind: str | None, batch: int, length: int) -> Tensor | None:
    at = torch.arange(length)
    rows = {"left": at >= 37, "right": at < length - 37, "anywhere": at % 5 > 0}
    return None if kind is None else torch.stack([at >= 0, rows[kind]])[torch.arange(batch) % 2]


def random_tiles(batch: int, heads: int, length: int, share: float = 0.3, rows: int = SIZE) -> Tiles:
    listed, total = tile_counts(length, length, SIZE, rows)
    mask = torch.rand(batch, heads, listed, total) < share
    own = own_tiles(listed, length, SIZE, rows)[:, None] == torch.arange(total)
    return Tiles.of_mask(mask | own, SIZE, rows)


@pytest.mark.parametrize("kind", ["independent", "heavy tails", "far from zero"])
def test_no_logit_is_above_its_bound(kind):
    query, key = (tensor.double() for tensor in draw(kind, 2, 2, 2, 75))
    valid = padding("anywhere", 2, 75)
    valid[1, :SIZE] = False
    low, high = tile_extremes(key, SIZE, valid)
    bound = query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)
    logits = (query @ key.transpose(-1, -2)).masked_fill(~valid[:, None, None], -torch.inf)
    for tile in range(5):
        most = logits[..., tile * SIZE : (tile + 1) * SIZE].amax(-1)
        assert bool((most <= bound[..., tile] + 1e-12).all())
    assert not low[1, :, 0].any() and not high[1, :, 0].any()


def gold_support(query: Tensor, key: Tensor, valid: Tensor | None, **options) -> Tensor:
    """`support` of rows with padding, each row by itself: `[B, Hq, T, T]` bool."""
    if valid is None:
        return support(query, key, **options)[0]
    gold = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
    for row, real in enumerate(valid):
        edges, _ = support(query[row, None, :, real], key[row, None, :, real], **options)
        gold[row][:, real.nonzero(), real.nonzero()[:, 0]] = edges[0]
    return gold


@pytest.mark.cross("values")
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["independent", "alike", "heavy tails", "far from zero", "equal keys"])
def test_a_certificate_is_never_wrong(kind, causal, alpha):
    """30 times 6,144 rows in float32, against the support in float64."""
    torch.manual_seed(0)
    batch, heads, kv_heads, length = 6, 4, 2, 256
    query, key = draw(kind, batch, heads, kv_heads, length)
    certified = 0
    for turn, pad in enumerate((None, "left", "right", "anywhere")):
        part = slice(turn, batch, 4)
        q, k = query[part], key[part]
        valid = padding(pad, len(q), length)
        options = {"alpha": alpha, "scaling": 0.4, "causal": causal}
        tiles = random_tiles(len(q), heads if turn % 2 else kv_heads, length)
        _, certificate = certified_entmax_attention(q, k, torch.zeros_like(k), tiles, valid=valid, **options)
        gold = gold_support(q.double(), k.double(), valid, **options)
        reached = tiles.edges(length, length, causal=causal)
        missed = gold & ~reached.repeat_interleave(heads // reached.shape[1], 1)
        assert not bool((missed.any(-1) & certificate.exact).any())
        certified += int(certificate.exact.sum())
    assert certified > 0 or kind == "independent"


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_a_certificate_is_not_wrong_by_rounding(alpha, shift):
    """Skipped keys a few units of rounding above or below tau, 4,096 rows of one query each."""
    torch.manual_seed(0)
    rows, dim = 4096, 6
    query = torch.randn(rows, 1, 1, dim, dtype=torch.float64).float()
    key = torch.randn(rows, 1, 8, dim, dtype=torch.float64)
    towards = query.double() / query.double().square().sum(-1, keepdim=True)
    key += towards * shift
    options = {"alpha": alpha, "scaling": 1.0, "causal": True}
    tiles = Tiles(torch.zeros(rows, 1, 1, 1, dtype=torch.int64), 4)

    def tau_of_first() -> Tensor:
        wide = certified_entmax_attention(query.double(), key.float().double(), key, tiles, **options)[1]
        return wide.tau[..., None]

    offset = torch.linspace(-3e-6, 3e-6, rows, dtype=torch.float64)[:, None, None, None] * (1 + shift)
    key[:, :, 4:] = towards * (tau_of_first() + offset) / (alpha - 1)
    key = key.float()
    _, certificate = certified_entmax_attention(query, key, key, tiles, **options)
    gold, _ = support(query.double(), key.double(), **options)
    assert 0.3 < float(gold[..., 4:].any(-1).double().mean()) < 0.7  # the offsets straddle tau
    assert not bool((gold[..., 4:].any(-1) & certificate.exact).any())


@pytest.mark.cross
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("pad", [None, "left", "right", "anywhere"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [SIZE, 1])
def test_complete_is_full_entmax(causal, pad, heads, rows):
    torch.manual_seed(0)
    query, key = draw("alike", 2, 4, 2, 203)
    if rows < SIZE:  # single queries are summed in another order than all at once, which float32 would show
        query, key = query.double(), key.double()
    value = torch.randn_like(key)
    options = {"alpha": 1.5, "scaling": 0.4, "causal": causal, "valid": padding(pad, 2, 203)}
    tiles = random_tiles(2, heads, 203, share=0.1, rows=rows)
    full = entmax_attention(query, key, value, **options)
    output, certificate = certified_entmax_attention(query, key, value, tiles, complete=True, **options)
    torch.testing.assert_close(output, full, rtol=0, atol=1e-6)
    less = certified_entmax_attention(query, key, value, tiles, **options)
    assert torch.equal(less[1].exact, certificate.exact) and not less[1].added.any()
    assert float((less[0] - full).abs().max()) > 0.01 and not bool(certificate.exact.all())
    torch.testing.assert_close(*(out[certificate.exact] for out in (less[0], full)), rtol=0, atol=1e-6)
    assert bool(certificate.added.any()) and float(certificate.exact.double().mean()) > 0.1
    before, after = (lists.mask(13).double().mean() for lists in (tiles, certificate.tiles))
    assert before < after < 0.8  # far from all tiles
    assert bool((certificate.tiles.mask(13) | ~tiles.mask(13)).all())
    assert torch.equal(certificate.support, gold_support(query, key, **options).sum(-1))


def test_a_complete_list_trains():
    torch.manual_seed(0)
    query, key = (tensor.double().requires_grad_() for tensor in draw("alike", 1, 2, 1, 70))
    options = {"alpha": 1.5, "scaling": 0.4, "causal": True}
    tiles = random_tiles(1, 2, 70, share=0.1)
    output, _ = certified_entmax_attention(query, key, key, tiles, complete=True, **options)
    full = entmax_attention(query, key, key, **options)
    upstream = torch.randn_like(full)
    for ours, theirs in zip(*(torch.autograd.grad(out, (query, key), upstream) for out in (output, full)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_padding_is_certified_and_adds_nothing():
    torch.manual_seed(0)
    query, key = draw("alike", 2, 2, 2, 96)
    valid = torch.arange(96) >= torch.tensor([[40], [0]])
    query, key = (tensor.masked_fill(~valid[:, None, :, None], torch.nan) for tensor in (query, key))
    nothing = Tiles(torch.zeros(1, 1, 6, 0, dtype=torch.int64), SIZE)
    tiles, certified = complete_tiles(query, key, nothing, alpha=1.5, scaling=0.4, causal=False, valid=valid)
    assert torch.equal(certified, ~valid[:, None].expand(2, 2, 96))
    listed = tiles.mask(6)
    assert listed[1].all()  # nothing is known about rows without a key
    assert not listed[0, :, :2].any() and not listed[0, ..., :2].any() and listed[0, :, 2:, 2:].all()


@pytest.mark.cross
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("pad", [None, "left", "right", "anywhere"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [SIZE, 4])
def test_the_bound_alone_predicts_all_support(causal, pad, grouped, rows, monkeypatch):
    torch.manual_seed(0)
    query, key = draw("alike", 2, 4, 2, 203)
    options = {"alpha": 1.5, "scaling": 0.4, "causal": causal, "valid": padding(pad, 2, 203)}
    full = entmax_attention(query, key, key, **options)
    counts = []
    for first in (0, 4):
        monkeypatch.setattr(predict, "_FIRST", first)
        tiles = bound_tiles(query, key, size=SIZE, rows=rows, grouped=grouped, **options)
        assert tiles.index.shape[:3] == (2, 2 if grouped else 4, -(-203 // rows))
        torch.testing.assert_close(entmax_attention(query, key, key, tiles=tiles, **options), full, rtol=0, atol=1e-6)
        counts.append(float(tiles.counts.double().mean()))
    assert counts[1] < counts[0] < 13  # a better tau excludes more


@pytest.mark.parametrize(("queries", "rows"), [(1, SIZE), (32, SIZE), (3, 1)])
def test_the_bound_of_texts_of_other_lengths(queries, rows):
    torch.manual_seed(0)
    query, key = (tensor.double() for tensor in draw("alike", 2, 4, 2, 203))
    first_query = torch.tensor([160, 16])
    query = torch.stack([query[b, :, at : at + queries] for b, at in enumerate(first_query.tolist())])
    options = {"alpha": 1.5, "scaling": 0.4, "causal": True, "first_query": first_query}
    tiles = bound_tiles(query, key, size=SIZE, rows=rows, **options)
    assert not tiles.mask(13)[1, :, :, 3:].any()
    full = entmax_attention(query, key, key, **options)
    torch.testing.assert_close(entmax_attention(query, key, key, tiles=tiles, **options), full, rtol=0, atol=1e-12)


@pytest.mark.cross("values")
@pytest.mark.parametrize("queries", [75, 40, 1])
@pytest.mark.parametrize("lag, rows", [(0, SIZE), (5, SIZE), (SIZE - 1, SIZE), (0, 1), (3, 4)])
@pytest.mark.parametrize("grouped", [False, True])
def test_scores_are_those_of_the_rule(queries, lag, rows, grouped):
    """Query by query and tile by tile."""
    torch.manual_seed(0)
    query, key = (tensor.double() for tensor in draw("independent", 1, 4, 2, 75))
    query = query[:, :, 75 - queries :]
    options = {"alpha": 1.5, "scaling": 0.5, "causal": True}
    reach = {"window": 3, "global_tokens": 2, "rows": rows}
    scores = bound_scores(query, key, size=SIZE, grouped=grouped, lag=lag, **reach, **options)
    near = window_and_global(queries, 75, SIZE, causal=True, **reach)
    _, certificate = certified_entmax_attention(query, key, key, near, **options)
    low, high = tile_extremes(key, SIZE)
    listed, total = tile_counts(queries, 75, SIZE, rows)
    expected = torch.full((1, 4, listed, total), -torch.inf, dtype=torch.float64)
    for head in range(4):
        for t in range(queries):
            place = 75 - queries + t
            row = (place + lag) // rows - (75 - queries) // rows
            if place + lag >= 75:
                continue
            for tile in range(((75 - queries) // rows + row) * rows // SIZE + 1):
                q = query[0, head, t] * 0.5 * 0.5
                bound = torch.maximum(q * low[0, head // 2, tile], q * high[0, head // 2, tile]).sum()
                expected[0, head, row, tile].clamp_(min=float(bound - certificate.tau[0, head, t]))
    if grouped:
        expected = expected.unflatten(1, (2, 2)).amax(2)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


def test_with_a_lag_no_list_depends_on_later_tokens():
    torch.manual_seed(0)
    query, key = draw("independent", 1, 4, 2, 96)
    options = {"alpha": 1.5, "scaling": 0.4, "causal": True, "size": SIZE}
    changed = [torch.cat([tensor[:, :, :49], torch.randn_like(tensor[:, :, 49:])], 2) for tensor in (query, key)]
    own = torch.eye(6, dtype=torch.bool)  # always listed, whatever its score
    for lag, same in ((SIZE - 1, True), (0, False)):
        before, after = (bound_scores(q, k, lag=lag, **options)[:, :, :4] for q, k in ((query, key), changed))
        assert torch.equal(*(scores.masked_fill(own[:4], 0.0) for scores in (before, after))) is same


def test_the_bound_needs_no_large_buffer(largest_tensor, monkeypatch):
    """One flag per pair of tiles is the largest; nothing has tokens times tiles."""
    monkeypatch.setitem(blocks.BUFFER, "cpu", 1 << 12)
    query, key = draw("alike", 1, 2, 1, 2048)
    with largest_tensor() as tracked:
        bound_tiles(query, key, size=SIZE, alpha=1.5, scaling=0.4, causal=True)
    assert tracked.numel <= 2 * 128 * 129 < 2048 * 128


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"size": 0}, "at least 1 position, got size=0"),
        ({"global_tokens": -1}, "at least 0, got 1 and -1"),
        ({"alpha": 3.0}, r"alpha must be in \(1, 2\]"),
    ],
)
def test_bad_input(changes, match):
    query, key = draw("alike", 1, 2, 1, 48)
    with pytest.raises(ValueError, match=match):
        bound_tiles(query, key, **({"size": SIZE, "alpha": 1.5, "scaling": 0.4, "causal": True} | changes))
