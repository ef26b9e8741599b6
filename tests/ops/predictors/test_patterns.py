"""Hashes and clusters against loops, and the tiles of baseline patterns at a given count."""

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.ops.predictors import pattern_tiles, patterns
from hf_sparse.ops.predictors.kmeans import kmeans
from hf_sparse.ops.predictors.metrics import tile_sparsity
from hf_sparse.ops.tiles.select import best_tiles, counts_for_sparsity
from hf_sparse.ops.tiles.tiles import window_and_global

BATCH, HEADS, KV_HEADS, RANK = 3, 4, 2, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_reformer():
    query, key = torch.randn(BATCH, HEADS, 5, RANK), torch.randn(BATCH, KV_HEADS, 14, RANK)
    rotations = patterns.lsh_rotations(RANK, 6, 2, generator=torch.Generator().manual_seed(0))
    for points in (query, key):
        found = patterns.lsh_buckets(points, rotations)
        for index in torch.cartesian_prod(*map(torch.arange, points.shape[:3])).tolist():
            point = points[tuple(index)]
            hashes = [int(torch.cat([point @ turn, -(point @ turn)]).argmax()) for turn in rotations]
            assert found[tuple(index)].tolist() == [hashes[0], 6 + hashes[1]]
        # A hash is of the direction only.
        assert torch.equal(found, patterns.lsh_buckets(points * 7, rotations))


def test_routing():
    keys = 14
    query, key = torch.randn(BATCH, HEADS, keys, RANK), torch.randn(BATCH, KV_HEADS, keys, RANK)
    centroids = kmeans(F.normalize(key[0], dim=-1), 3)
    for points, found in zip((query, key), patterns.routing_clusters(query, key, centroids), strict=True):
        for b in range(BATCH):
            for h in range(points.shape[1]):
                of_head = F.normalize(centroids[h * KV_HEADS // points.shape[1]], dim=-1)
                distance = (F.normalize(points[b, h], dim=-1)[:, None] - of_head).square().sum(-1)
                for c in range(3):
                    order = sorted(range(keys), key=lambda t, c=c, distance=distance: (float(distance[t, c]), t))
                    taken = set(order[: keys // 3 + 1])
                    assert {t for t in range(keys) if found[b, h, t, c] == c} == taken
                    assert {t for t in range(keys) if found[b, h, t, c] == -1} == set(range(keys)) - taken


def test_oracle():
    keys = 14
    mass = torch.rand(BATCH, HEADS, keys, keys)
    tiles = pattern_tiles.oracle_scores(mass, size=4)
    for row in range(4):
        for column in range(4):
            part = mass[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].sum((2, 3))
            torch.testing.assert_close(tiles[:, :, row, column], part)
    torch.testing.assert_close(pattern_tiles.oracle_scores(mass[:, :, 9:], size=4)[:, :, 1], tiles[:, :, 3])
    grouped = pattern_tiles.oracle_scores(mass, size=4, kv_heads=KV_HEADS)
    torch.testing.assert_close(grouped, tiles.unflatten(1, (KV_HEADS, -1)).sum(2))


SIZE, LENGTH = 4, 62


def all_scores(query, key, counts) -> dict[str, torch.Tensor]:
    listed = total = -(-LENGTH // SIZE)
    own = torch.arange(total)
    generator = torch.Generator().manual_seed(0)
    return {
        "longformer": pattern_tiles.nearest_scores(own, total),
        "bigbird": pattern_tiles.random_scores(BATCH, HEADS, listed, total, generator=generator),
        "strided": pattern_tiles.strided_scores(counts, own, total, causal=True),
        "fixed": pattern_tiles.fixed_scores(counts, own, total, causal=True),
        "reformer": pattern_tiles.lsh_scores(
            query, key, patterns.lsh_rotations(RANK, 4, 2, generator=generator), size=SIZE
        ),
        "routing": pattern_tiles.routing_scores(query, key, torch.randn(KV_HEADS, 4, RANK), size=SIZE),
        "oracle": pattern_tiles.oracle_scores(torch.rand(BATCH, HEADS, LENGTH, LENGTH), size=SIZE),
    }


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_all_tiles_have_the_same_sparsity(sparsity):
    query, key = torch.randn(BATCH, HEADS, LENGTH, RANK), torch.randn(BATCH, KV_HEADS, LENGTH, RANK)
    total = -(-LENGTH // SIZE)
    counts = counts_for_sparsity(torch.arange(total) + 1, sparsity)
    always = window_and_global(LENGTH, LENGTH, SIZE, window=2, global_tokens=1, causal=True)
    found = {}
    for name, scores in all_scores(query, key, counts).items():
        tiles = best_tiles(scores, counts, size=SIZE, causal=True, always=always)
        found[name] = tile_sparsity(tiles, LENGTH, causal=True)
        assert (found[name] - sparsity).abs().max() < 0.5 / 36  # to the nearest integer of at least 36 pairs
    assert all(torch.equal(of[:, :1].expand(BATCH, HEADS), of.expand(BATCH, HEADS)) for of in found.values())


def pairs(of_query, of_key) -> torch.Tensor:
    """Shared buckets of each pair of 16 queries and keys, summed over tiles of 4."""
    of_key = of_key.repeat_interleave(HEADS // KV_HEADS, 1)
    same = (of_query[..., :, None, :] == of_key[..., None, :, :]) & (of_query[..., :, None, :] >= 0)
    return same.sum(-1).unflatten(3, (4, 4)).unflatten(2, (4, 4)).sum((3, 5)).float()


def test_lsh_and_routing_tiles_count_pairs():
    query, key = torch.randn(BATCH, HEADS, 16, RANK), torch.randn(BATCH, KV_HEADS, 16, RANK)
    rotations, centroids = patterns.lsh_rotations(RANK, 4, 2), torch.randn(KV_HEADS, 4, RANK)
    hashed = pairs(*(patterns.lsh_buckets(points, rotations) for points in (query, key)))
    assert torch.equal(pattern_tiles.lsh_scores(query, key, rotations, size=4), hashed)
    routed = pairs(*patterns.routing_clusters(query, key, centroids))
    assert torch.equal(pattern_tiles.routing_scores(query, key, centroids, size=4), routed)
    grouped = pattern_tiles.routing_scores(query, key, centroids, size=4, per_group=True)
    assert torch.equal(grouped, routed.unflatten(1, (KV_HEADS, -1)).sum(2))


def chosen(scores, count, causal) -> list[int]:
    """Of the last query tile."""
    return best_tiles(scores, count, size=SIZE, causal=causal).index[0, 0, -1].tolist()


def test_nearest_tiles():
    assert chosen(pattern_tiles.nearest_scores(torch.arange(16), 16), 4, True) == [12, 13, 14, 15]
    both = best_tiles(pattern_tiles.nearest_scores(torch.arange(16), 16), 4, size=SIZE, causal=False).index[0, 0]
    assert both[8].tolist() == [6, 7, 8, 9] and both[0].tolist() == [0, 1, 2, 3]


def test_strided_tiles():
    # 4 next to the query, and 4 of the 16 - 4 others: every third from there.
    assert chosen(pattern_tiles.strided_scores(8, torch.arange(16), 16, causal=True), 8, True) == [
        0,
        3,
        6,
        9,
        12,
        13,
        14,
        15,
    ]
    assert chosen(pattern_tiles.strided_scores(16, torch.arange(16), 16, causal=True), 16, True) == list(range(16))
    assert chosen(pattern_tiles.strided_scores(1, torch.arange(16), 16, causal=True), 1, True) == [15]
    rows = pattern_tiles.strided_scores(8, torch.arange(13, 16), 16, causal=True)
    assert torch.equal(rows, pattern_tiles.strided_scores(8, torch.arange(16), 16, causal=True)[:, :, 13:])


def test_fixed_tiles():
    # 4 columns for all, the last of every 4 tiles; the query's own is one of them, and the nearest takes its place.
    assert chosen(pattern_tiles.fixed_scores(8, torch.arange(16), 16, causal=True), 8, True) == [
        3,
        7,
        10,
        11,
        12,
        13,
        14,
        15,
    ]
    tiles = best_tiles(pattern_tiles.fixed_scores(8, torch.arange(16), 16, causal=False), 8, size=SIZE, causal=False)
    assert tiles.mask(16)[0, 0, :, 3::4].all()


def test_bad_input():
    for call, message in (
        (lambda: patterns.lsh_rotations(4, 3, 1), "even number of buckets and at least 1 round, got 3 and 1"),
        (lambda: patterns.lsh_buckets(torch.zeros(1, 1, 4, 3), torch.zeros(1, 4, 2)), "for rank 4"),
        (
            lambda: patterns.routing_clusters(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, 3), torch.ones(1, 2, 3)),
            "2 queries of 4 keys",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
