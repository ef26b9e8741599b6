"""A given number of tiles per row, against loops."""

import pytest
import torch

from hf_sparse.ops.tiles.allowed import allowed_tiles, tiles_of_valid
from hf_sparse.ops.tiles.select import best_tiles, counts_for_sparsity
from hf_sparse.ops.tiles.tiles import Tiles, own_tiles, window_and_global

SIZE = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def padding(keys: int) -> torch.Tensor:
    valid = torch.ones(3, keys, dtype=torch.bool)
    valid[0, : keys // 2] = False
    valid[1, -(keys // 3) :] = False
    return valid


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("listed", [6, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 50, "per row"])
def test_best_tiles(causal, listed, count):
    keys, total = 23, 6
    scores = torch.randint(4, (3, 2, listed, total)).float()  # many ties
    scores[torch.rand_like(scores) < 0.2] = -torch.inf
    valid = padding(keys)
    if count == "per row":
        count = torch.randint(0, 5, (3, 1, listed))
    always = window_and_global(listed * SIZE - 1, keys, SIZE, window=2, global_tokens=1, causal=causal)
    found = best_tiles(scores, count, size=SIZE, causal=causal, valid=valid, always=always)
    counts = torch.as_tensor(count).expand(3, 2, listed)
    allowed = allowed_tiles(
        torch.arange(total - listed, total), total, causal=causal, valid_tiles=tiles_of_valid(valid, SIZE)
    )
    fixed = always.mask(total)
    for b in range(3):
        for h in range(2):
            for row in range(listed):
                first = []
                for tile in range(total):
                    diagonal, forced = tile == total - listed + row, bool(fixed[0, 0, row, tile])
                    score = float(scores[b, h, row, tile])
                    if allowed[b, 0, row, tile] and (diagonal or forced or score > -torch.inf):
                        first.append((-diagonal, -forced, -score, tile))
                wanted = sorted(tile for *_, tile in sorted(first)[: counts[b, h, row]])
                assert [tile for tile in found.index[b, h, row].tolist() if tile >= 0] == wanted


@pytest.mark.parametrize("rows", [1, 2])
def test_smaller_tiles_of_queries_are_ranked_like_the_tile_they_lie_in(rows):
    keys, total = 23, 6
    listed = -(-keys // rows)
    own = own_tiles(listed, keys, SIZE, rows)
    scores = torch.randint(9, (2, 3, listed, total)).float()
    options = {"window": 6, "global_tokens": 1, "causal": True}
    always = window_and_global(keys, keys, SIZE, rows=rows, **options)
    found = best_tiles(scores, 3, size=SIZE, rows=rows, own=own, causal=True, always=always)
    assert (found.size, found.rows) == (SIZE, rows)
    for row, tile in enumerate(own.tolist()):
        near = Tiles(always.index[:, :, row : row + 1], SIZE)
        alone = best_tiles(scores[:, :, row : row + 1, : tile + 1], 3, size=SIZE, causal=True, always=near)
        assert torch.equal(found.mask(total)[:, :, row, : tile + 1], alone.mask(tile + 1)[:, :, 0])
        assert not found.mask(total)[:, :, row, tile + 1 :].any()


def test_own_tiles_may_differ_between_texts():
    scores = torch.randint(9, (2, 3, 2, 6)).float()
    first_query = torch.tensor([4, 14])
    own = own_tiles(2, 23, SIZE, 2, first_query=first_query)
    assert own.tolist() == [[1, 1], [3, 4]]
    options = {"rows": 2, "window": 3, "global_tokens": 1, "causal": True}
    always = window_and_global(4, 23, SIZE, first_query=first_query, **options)
    found = best_tiles(scores, 3, size=SIZE, rows=2, own=own, causal=True, always=always)
    for row, keys in enumerate((8, 18)):
        near = window_and_global(4, keys, SIZE, **options)
        total = -(-keys // SIZE)
        alone = best_tiles(
            scores[row, None, :, :, :total], 3, size=SIZE, rows=2, own=own[row], causal=True, always=near
        )
        assert torch.equal(found.mask(6)[row, None, ..., :total], alone.mask(total))
        assert not found.mask(6)[row, ..., total:].any()


def test_counts_of_smaller_tiles_of_queries():
    own = own_tiles(12, 23, SIZE, 2)  # two in each of six tiles
    counts = counts_for_sparsity(own + 1, 0.5)
    assert counts.sum() == 21 and (counts <= own + 1).all()  # of 42
    assert counts_for_sparsity(torch.full((12,), 6), 0.5).tolist() == [3] * 12


def test_everything_and_nothing():
    scores = torch.zeros(1, 1, 5, 5)
    assert best_tiles(scores, 5, size=SIZE, causal=False).mask(5).all()
    assert torch.equal(best_tiles(scores, 1, size=SIZE, causal=True).mask(5)[0, 0], torch.eye(5, dtype=torch.bool))
    assert best_tiles(scores, 5, size=SIZE, causal=False, valid=torch.zeros(1, 18, dtype=torch.bool)).index.numel() == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_sparsity_is_hit_as_integers_allow(causal, padded, sparsity):
    total = 17
    valid_tiles = tiles_of_valid(padding(total * SIZE), SIZE) if padded else None
    allowed = allowed_tiles(torch.arange(total), total, causal=causal, valid_tiles=valid_tiles).sum(-1)  # [B, 1, nq]
    counts = counts_for_sparsity(allowed, sparsity)
    assert (counts <= allowed).all() and (counts[allowed > 0] >= 1).all()
    wanted = ((1 - sparsity) * allowed.sum(-1).double()).round().long()
    rows = (allowed > 0).sum(-1)
    assert torch.equal(counts.sum(-1), wanted.maximum(rows))
    whole = counts == allowed
    for b in range(len(counts)):
        level = counts[b][~whole[b]]
        assert not len(level) or int(level.max() - level.min()) <= 1
        assert not len(level) or counts[b].max() <= level.max() + 1
    tiles = best_tiles(
        torch.rand(len(counts), 2, total, total),
        counts,
        size=SIZE,
        causal=causal,
        valid=None if valid_tiles is None else padding(total * SIZE),
    )
    assert torch.equal(tiles.counts, counts.expand(-1, 2, -1))


def test_counts_do_not_grow_with_the_row():
    assert counts_for_sparsity(torch.arange(6) + 1, 0.5).tolist() == [1, 1, 2, 2, 2, 2]  # 10 of 21
    assert counts_for_sparsity(torch.full((4,), 4), 0.5).tolist() == [2, 2, 2, 2]


def test_bad_input():
    scores = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="at least 1 key tile, got count=0"):
        best_tiles(scores, 0, size=SIZE, causal=True)
    with pytest.raises(ValueError, match=r"nq <= nk, got \(1, 1, 4, 3\)"):
        best_tiles(scores[..., :3], 1, size=SIZE, causal=True)
    with pytest.raises(ValueError, match="tiles of 4 by 4 for 4 query tiles, got tiles of 8 by 8 for 4"):
        best_tiles(scores, 1, size=SIZE, causal=True, always=Tiles(torch.zeros(1, 1, 4, 1, dtype=torch.int64), 8))
    with pytest.raises(ValueError, match="own tiles of 4 query tiles, got 3"):
        best_tiles(scores, 1, size=SIZE, rows=2, own=torch.arange(3), causal=True)
    with pytest.raises(ValueError, match="17 positions are 5 tiles of 4, got 4 tiles"):
        best_tiles(scores, 1, size=SIZE, causal=True, valid=torch.ones(1, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"below 1, got 1\.0"):
        counts_for_sparsity(torch.arange(4) + 1, 1.0)
