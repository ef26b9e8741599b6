"""Baseline patterns against loops, and their tiles at a given count."""

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.ops.graphs import pattern_tiles, patterns
from hf_sparse.ops.graphs.allowed import allowed_edges, positions_of, tiles_of_valid
from hf_sparse.ops.graphs.buckets import bucket_edges
from hf_sparse.ops.graphs.kmeans import kmeans
from hf_sparse.ops.graphs.metrics import tile_sparsity
from hf_sparse.ops.graphs.select import best_tiles, tiles_for_sparsity
from hf_sparse.ops.graphs.tiles import window_and_global

BATCH, HEADS, KV_HEADS, RANK = 3, 4, 2, 3
LENGTHS = pytest.mark.parametrize(("queries", "keys"), [(14, 14), (5, 14)])
ORDERS = pytest.mark.parametrize("causal", [True, False])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def padding(keys: int) -> torch.Tensor:
    valid = torch.ones(BATCH, keys, dtype=torch.bool)
    valid[0, : keys // 3] = False
    valid[1, -(keys // 4) :] = False
    return valid


def loop(queries, keys, valid, causal, joined) -> torch.Tensor:
    edges = torch.zeros(BATCH, 1, queries, keys, dtype=torch.bool)
    for b in range(BATCH):
        for row in range(queries):
            i = keys - queries + row
            for j in range(keys):
                if valid[b, i] and valid[b, j] and (j <= i or not causal):
                    edges[b, 0, row, j] = joined(b, i, j)
    return edges


@LENGTHS
@ORDERS
@pytest.mark.parametrize("window", [0, 1, 4, 5])
@pytest.mark.parametrize("global_tokens", [0, 2])
def test_window(queries, keys, causal, window, global_tokens):
    valid = padding(keys)

    def joined(b, i, j):
        begin = i - window + 1 if causal else i - window // 2
        first = [t for t in range(keys) if valid[b, t]][:global_tokens]
        return begin <= j < begin + window or i in first or j in first

    found = patterns.window_edges(queries, keys, window=window, global_tokens=global_tokens, causal=causal, valid=valid)
    assert torch.equal(found, loop(queries, keys, valid, causal, joined))


@LENGTHS
@ORDERS
def test_bigbird_draws_from_all_allowed_keys(queries, keys, causal):
    valid, generator = padding(keys), torch.Generator().manual_seed(0)
    common = {"window": 3, "global_tokens": 1, "causal": causal, "valid": valid}
    near = patterns.window_edges(queries, keys, **common)
    free = allowed_edges(positions_of(queries, keys), keys, causal=causal, valid=valid) & ~near
    drawn = torch.zeros(BATCH, HEADS, queries, keys)
    for _ in range(200):
        found = patterns.bigbird_edges(queries, keys, heads=HEADS, random=2, generator=generator, **common)
        extra = found & ~near
        assert torch.equal(found & near, near.expand_as(found))
        assert not (extra & ~free).any()
        assert torch.equal(extra.sum(-1), free.sum(-1).clamp(max=2).expand(-1, HEADS, -1))
        drawn += extra
    expected = (200 * free.sum(-1, keepdim=True).clamp(max=2) / free.sum(-1, keepdim=True).clamp(min=1)) * free
    assert ((drawn - expected).abs() <= 5 * 50**0.5).all()
    assert (drawn.sum(1, keepdim=True)[free] > 0).all()


@LENGTHS
@ORDERS
@pytest.mark.parametrize("stride", [1, 3, 20])
def test_sparse_transformer(queries, keys, causal, stride):
    valid = padding(keys)
    found = patterns.strided_edges(queries, keys, stride=stride, causal=causal, valid=valid)
    expected = loop(queries, keys, valid, causal, lambda b, i, j: abs(i - j) < stride or (i - j) % stride == 0)
    assert torch.equal(found, expected)
    for summary in {1, stride}:
        found = patterns.fixed_edges(queries, keys, stride=stride, expressivity=summary, causal=causal, valid=valid)

        def joined(b, i, j, summary=summary):
            return i // stride == j // stride or j % stride in range(stride - summary, stride)

        assert torch.equal(found, loop(queries, keys, valid, causal, joined))


@LENGTHS
@ORDERS
def test_reformer(queries, keys, causal):
    query, key, valid = (
        torch.randn(BATCH, HEADS, queries, RANK),
        torch.randn(BATCH, KV_HEADS, keys, RANK),
        padding(keys),
    )
    rotations = patterns.lsh_rotations(RANK, 6, 2, generator=torch.Generator().manual_seed(0))
    found = patterns.lsh_edges(query, key, rotations, causal=causal, valid=valid)

    def hashes(point):
        return [torch.cat([point @ turn, -(point @ turn)]).argmax() for turn in rotations]

    for h in range(HEADS):

        def joined(b, i, j, h=h):
            left, right = hashes(query[b, h, i - keys + queries]), hashes(key[b, h // 2, j])
            return any(a == b for a, b in zip(left, right, strict=True))

        assert torch.equal(found[:, h : h + 1], loop(queries, keys, valid, causal, joined))
    assert found.any()
    # A hash is of the direction only.
    assert torch.equal(found, patterns.lsh_edges(query * 7, key * 0.1, rotations, causal=causal, valid=valid))


def test_routing():
    keys = 14
    query, key, valid = torch.randn(BATCH, HEADS, keys, RANK), torch.randn(BATCH, KV_HEADS, keys, RANK), padding(keys)
    centroids = kmeans(F.normalize(key[0], dim=-1), 3)
    found = patterns.routing_edges(query, key, centroids, causal=True, valid=valid)
    for b in range(BATCH):
        real = [t for t in range(keys) if valid[b, t]]

        def taken(points, centroid, b=b, real=real):
            distance = (F.normalize(points[b], dim=-1) - F.normalize(centroid, dim=-1)).square().sum(-1)
            return set(sorted(real, key=lambda token: (float(distance[token]), token))[: keys // 3 + 1])

        for h in range(HEADS):
            edges = torch.zeros(keys, keys, dtype=torch.bool)
            for centroid in centroids[h // 2]:
                for i in taken(query[:, h], centroid):
                    for j in taken(key[:, h // 2], centroid):
                        edges[i, j] |= j <= i
            assert torch.equal(found[b, h], edges)


@ORDERS
def test_oracle(causal):
    keys, valid = 14, padding(14)
    allowed = allowed_edges(torch.arange(keys), keys, causal=causal, valid=valid)
    mass = torch.rand(BATCH, HEADS, keys, keys) * allowed
    found = patterns.oracle_edges(mass, 3, causal=causal, valid=valid)
    assert torch.equal(found.sum(-1), allowed.sum(-1).clamp(max=3).expand(-1, HEADS, -1))
    best = mass.sort(dim=-1, descending=True).values[..., :3].sum(-1)
    torch.testing.assert_close((mass * found).sum(-1), best)
    rows = torch.tensor([4, 9])
    assert torch.equal(
        patterns.oracle_edges(mass[:, :, rows], 3, causal=causal, valid=valid, position=rows), found[:, :, rows]
    )
    tiles = pattern_tiles.oracle_scores(mass, size=4)
    for row in range(4):
        for column in range(4):
            part = mass[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].sum((2, 3))
            torch.testing.assert_close(tiles[:, :, row, column], part)
    torch.testing.assert_close(pattern_tiles.oracle_scores(mass[:, :, 9:], size=4)[:, :, 1], tiles[:, :, 3])
    grouped = pattern_tiles.oracle_scores(mass, size=4, kv_heads=KV_HEADS)
    torch.testing.assert_close(grouped, tiles.unflatten(1, (KV_HEADS, -1)).sum(2))


SIZE, LENGTH = 4, 62


def all_scores(query, key, valid, counts) -> dict[str, torch.Tensor]:
    listed = total = -(-LENGTH // SIZE)
    own = torch.arange(total)
    generator = torch.Generator().manual_seed(0)
    return {
        "longformer": pattern_tiles.nearest_scores(own, total),
        "bigbird": pattern_tiles.random_scores(BATCH, HEADS, listed, total, generator=generator),
        "strided": pattern_tiles.strided_scores(counts, own, total, causal=True),
        "fixed": pattern_tiles.fixed_scores(counts, own, total, causal=True),
        "reformer": pattern_tiles.lsh_scores(
            query, key, patterns.lsh_rotations(RANK, 4, 2, generator=generator), size=SIZE, valid=valid
        ),
        "routing": pattern_tiles.routing_scores(query, key, torch.randn(KV_HEADS, 4, RANK), size=SIZE, valid=valid),
        "oracle": pattern_tiles.oracle_scores(torch.rand(BATCH, HEADS, LENGTH, LENGTH), size=SIZE),
    }


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_all_tiles_have_the_same_sparsity(padded, sparsity):
    query, key = torch.randn(BATCH, HEADS, LENGTH, RANK), torch.randn(BATCH, KV_HEADS, LENGTH, RANK)
    valid, total = padding(LENGTH) if padded else None, -(-LENGTH // SIZE)
    valid_tiles = tiles_of_valid(valid, SIZE) if padded else None
    counts = tiles_for_sparsity(sparsity, total, total, causal=True, valid_tiles=valid_tiles)
    always = window_and_global(LENGTH, LENGTH, SIZE, window=2, global_tokens=1, causal=True, valid=valid)
    found = {}
    for name, scores in all_scores(query, key, valid, counts).items():
        tiles = best_tiles(scores, counts, size=SIZE, causal=True, valid=valid, always=always)
        found[name] = tile_sparsity(tiles, LENGTH, causal=True, valid=valid)
        assert (found[name] - sparsity).abs().max() < 0.5 / 36  # to the nearest integer of at least 36 pairs
    assert all(torch.equal(of[:, :1].expand(BATCH, HEADS), of.expand(BATCH, HEADS)) for of in found.values())


def test_lsh_and_routing_tiles_count_pairs():
    query, key, valid = torch.randn(BATCH, HEADS, 16, RANK), torch.randn(BATCH, KV_HEADS, 16, RANK), padding(16)
    rotations, centroids = patterns.lsh_rotations(RANK, 4, 1), torch.randn(KV_HEADS, 4, RANK)
    # With one round a pair counts once; centroids can share several.
    hashed = patterns.lsh_edges(query, key, rotations, causal=False, valid=valid)
    pairs = hashed.unflatten(3, (4, 4)).unflatten(2, (4, 4)).sum((3, 5))
    assert torch.equal(pattern_tiles.lsh_scores(query, key, rotations, size=4, valid=valid), pairs.float())
    of_query, of_key = patterns.routing_clusters(query, key, centroids, valid)
    pairs = sum(
        bucket_edges(of_query[..., c, None], of_key[..., c, None], 4, causal=False, valid=valid) for c in range(4)
    )
    pairs = pairs.unflatten(3, (4, 4)).unflatten(2, (4, 4)).sum((3, 5))
    assert torch.equal(pattern_tiles.routing_scores(query, key, centroids, size=4, valid=valid), pairs.float())


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
        (lambda: patterns.window_edges(4, 4, window=-1, causal=True), "at least 0, got -1 and 0"),
        (lambda: patterns.bigbird_edges(4, 4, heads=1, window=1, random=-2, causal=True), "-2 random keys"),
        (lambda: patterns.strided_edges(4, 4, stride=0, causal=True), "at least 1, got 0"),
        (lambda: patterns.fixed_edges(4, 4, stride=2, expressivity=3, causal=True), "to the stride, 2, got 3"),
        (lambda: patterns.lsh_rotations(4, 3, 1), "even number of buckets and at least 1 round, got 3 and 1"),
        (lambda: patterns.lsh_buckets(torch.zeros(1, 1, 4, 3), torch.zeros(1, 4, 2)), "for rank 4"),
        (lambda: patterns.oracle_edges(torch.zeros(1, 1, 4, 4), 0, causal=True), "at least 1 key, got count=0"),
        (
            lambda: patterns.routing_edges(
                torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, 3), torch.ones(1, 2, 3), causal=False
            ),
            "2 queries of 4 keys",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
