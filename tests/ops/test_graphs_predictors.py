"""The three predictors against loops over pairs of tokens."""

import itertools
import math

import pytest
import torch

from hf_sparse.ops.graphs.clustering import (
    assign,
    assign_balanced,
    balanced_width,
    clustering_edges,
    clustering_scores,
    training_points,
)
from hf_sparse.ops.graphs.distance import distance_edges
from hf_sparse.ops.graphs.kmeans import kmeans
from hf_sparse.ops.graphs.quantization import (
    fit_boundaries,
    fixed_bins,
    quantization_edges,
    quantization_scores,
    shared_bins,
)

BATCH, HEADS, KV_HEADS, RANK = 3, 4, 2, 3
SHAPES = [(29, 29, 4), (7, 29, 4), (1, 24, 8), (5, 5, 16)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def points(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, HEADS, queries, RANK), torch.randn(BATCH, KV_HEADS, keys, RANK)


def padding(keys: int) -> torch.Tensor:
    valid = torch.ones(BATCH, keys, dtype=torch.bool)
    valid[0, : keys // 3] = False
    valid[1, -(keys // 4) :] = False
    return valid


def poisoned(query, key, valid):
    """Padding holds NaN."""
    of_query = valid[:, None, valid.shape[1] - query.shape[2] :, None]
    return query.masked_fill(~of_query, torch.nan), key.masked_fill(~valid[:, None, :, None], torch.nan)


def loop_edges(query, key, valid, causal, joined) -> torch.Tensor:
    """`joined(b, head, query row, kv head, key)` for every allowed pair, False elsewhere."""
    queries, keys = query.shape[2], key.shape[2]
    edges = torch.zeros(BATCH, HEADS, queries, keys, dtype=torch.bool)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(queries):
                position = keys - queries + i
                for j in range(keys):
                    allowed = valid[b, j] and valid[b, position] and (j <= position or not causal)
                    if allowed and joined(b, h, i, h // (HEADS // KV_HEADS), j):
                        edges[b, h, i, j] = True
    return edges


def pairs_of_tiles(matches: torch.Tensor, size: int, lag: int = 0) -> torch.Tensor:
    """Sums of `[B, H, Tq, Tk]` over pairs of tiles."""
    queries, keys = matches.shape[2:]
    total, first = -(-keys // size), (keys - queries) // size
    sums = torch.zeros(BATCH, HEADS, total - first, total)
    for i in range(queries):
        row = (keys - queries + i + lag) // size - first
        for j in range(keys):
            if row < total - first:
                sums[:, :, row, j // size] += matches[:, :, i, j]
    return sums


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (4, 13)])
class TestEdges:
    def test_distance(self, queries, keys, causal):
        query, key = points(queries, keys)
        valid, threshold = padding(keys), torch.tensor([0.5, 2.0, 3.0, 9.0])

        def joined(b, h, i, g, j):
            return (query[b, h, i] - key[b, g, j]).square().sum() < threshold[h]

        expected = loop_edges(query, key, valid, causal, joined)
        found = distance_edges(*poisoned(query, key, valid), threshold, causal=causal, valid=valid)
        assert torch.equal(found, expected)
        assert expected.any() and not torch.equal(expected[:, 0], expected[:, 3])

    def test_shared_bins(self, queries, keys, causal):
        query, key = points(queries, keys)
        valid = padding(keys)
        edge = torch.randn(KV_HEADS, RANK, 4).sort(-1).values

        def bin_of(point, g, dim):
            return sum(float(point[dim]) >= float(at) for at in edge[g, dim])

        def joined(b, h, i, g, j):
            return any(bin_of(query[b, h, i], g, d) == bin_of(key[b, g, j], g, d) for d in range(RANK))

        expected = loop_edges(query, key, valid, causal, joined)
        found = quantization_edges(*poisoned(query, key, valid), edge, causal=causal, valid=valid)
        assert torch.equal(found, expected)
        assert expected.any()

    @pytest.mark.parametrize("top", [1, 2, 5])
    def test_clusters(self, queries, keys, causal, top):
        query, key = points(queries, keys)
        valid, centroids = padding(keys), torch.randn(KV_HEADS, 5, RANK)

        def clusters(point, g):
            return set((centroids[g] - point).square().sum(-1).argsort()[:top].tolist())

        def joined(b, h, i, g, j):
            return bool(clusters(query[b, h, i], g) & clusters(key[b, g, j], g))

        expected = loop_edges(query, key, valid, causal, joined)
        found = clustering_edges(*poisoned(query, key, valid), centroids, top=top, causal=causal, valid=valid)
        assert torch.equal(found, expected)
        assert expected.any()


def test_disjoint_clusters_never_match_not_even_on_the_diagonal():
    centroids = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    query, key = torch.zeros(1, 1, 6, 1), torch.full((1, 1, 6, 1), 10.2)
    assert not clustering_edges(query, key, centroids, top=2, causal=False).any()
    # First of one and second of the other.
    assert clustering_edges(query + 0.4, key * 0 + 0.6, centroids, top=2, causal=False).all()


@pytest.mark.parametrize("width", [1, 3, 4, 13])
def test_fixed_bins(width):
    query, key = points(13, 13)
    valid = padding(13)

    def ranks(tensor):  # [B, H, T, r], among the valid
        found = torch.full(tensor.shape, -1)
        for b in range(BATCH):
            for h in range(tensor.shape[1]):
                for d in range(RANK):
                    order = sorted((float(tensor[b, h, t, d]), t) for t in range(13) if valid[b, t])
                    for place, (_, t) in enumerate(order):
                        found[b, h, t, d] = place
        return found

    of_query, of_key = ranks(query) // width, ranks(key) // width

    def joined(b, h, i, g, j):
        return any(of_query[b, h, i, d] == of_key[b, g, j, d] for d in range(RANK))

    expected = loop_edges(query, key, valid, False, joined)
    assert torch.equal(
        quantization_edges(*poisoned(query, key, valid), width=width, causal=False, valid=valid), expected
    )


def test_fixed_bins_hold_equal_numbers_and_do_not_know_padding():
    key = torch.randn(1, 1, 12, RANK)
    ids, buckets = fixed_bins(key, 4)
    assert buckets == 3 * RANK
    assert (torch.bincount(ids.flatten(), minlength=buckets) == 4).all()
    padded = torch.cat([torch.full((1, 1, 4, RANK), torch.nan), key], 2)
    valid = torch.arange(16)[None] >= 4
    apart = torch.arange(RANK)  # a dimension has 4 bins now
    assert torch.equal(fixed_bins(padded, 4, valid)[0][:, :, 4:], ids + apart)


def test_boundaries_split_the_training_points_evenly():
    train = torch.randn(KV_HEADS, 60, RANK, dtype=torch.float64)
    edge = fit_boundaries(train, 5)
    assert edge.shape == (KV_HEADS, RANK, 4) and edge.dtype == torch.float64
    ids = shared_bins(train[None], edge)
    for head in range(KV_HEADS):
        assert (torch.bincount(ids[0, head].flatten(), minlength=5 * RANK) == 12).all()


@pytest.mark.parametrize("lag", ["own", "before"])
@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
class TestScores:
    """The score of two tiles is the number of matching pairs."""

    def test_clusters(self, queries, keys, size, lag):
        query, key = points(queries, keys)
        valid, centroids = padding(keys), torch.randn(KV_HEADS, 5, RANK)
        lag = size - 1 if lag == "before" else 0
        matches = torch.zeros(BATCH, HEADS, queries, keys)
        of_query, of_key = assign(query, centroids, 2, valid), assign(key, centroids, 2, valid)
        for h in range(HEADS):
            for a in range(2):
                for b in range(2):
                    left, right = of_query[:, h, :, None, a], of_key[:, h // 2, None, :, b]
                    matches[:, h] += (left == right) & (left >= 0)
        poison = poisoned(query, key, valid)
        found = clustering_scores(*poison, centroids, top=2, size=size, causal=True, valid=valid, lag=lag)
        expected = pairs_of_tiles(matches, size, lag)
        assert torch.equal(found, expected)
        shared = clustering_scores(
            *poison, centroids, top=2, size=size, causal=True, valid=valid, lag=lag, per_group=True
        )
        assert torch.equal(shared, expected.unflatten(1, (KV_HEADS, -1)).sum(2))

    @pytest.mark.parametrize("per_group", [True, False])
    def test_bins(self, queries, keys, size, lag, per_group):
        query, key = points(queries, keys)
        valid, edge = padding(keys), torch.randn(KV_HEADS, RANK, 3).sort(-1).values
        lag = size - 1 if lag == "before" else 0
        poison = poisoned(query, key, valid)
        arguments = {"size": size, "causal": False, "valid": valid, "lag": lag, "per_group": per_group}
        kinds = [((edge,), {}, shared_bins(query, edge, valid), shared_bins(key, edge, valid))]
        if queries == keys:
            kinds.append(((), {"width": 3}, fixed_bins(query, 3, valid)[0], fixed_bins(key, 3, valid)[0]))
        for given, more, of_query, of_key in kinds:
            matches = (of_query[..., :, None, :] == of_key.repeat_interleave(2, 1)[..., None, :, :]).float()
            real = (of_query[..., :, None, :] >= 0).float()
            expected = pairs_of_tiles((matches * real).sum(-1), size, lag)
            if per_group:
                expected = expected.unflatten(1, (KV_HEADS, -1)).sum(2)
            found = quantization_scores(*poison, *given, **more, **arguments)
            assert torch.equal(found, expected)


def test_a_key_keeps_its_bucket():
    """Later keys, earlier keys, other rows: nothing but the key and the fitted tensors decides."""
    key = torch.randn(2, KV_HEADS, 20, RANK)
    centroids, edge = torch.randn(KV_HEADS, 6, RANK), torch.randn(KV_HEADS, RANK, 5).sort(-1).values
    for whole, some in (
        (assign(key, centroids, 2), assign(key[1:, :, 7:8], centroids, 2)),
        (shared_bins(key, edge), shared_bins(key[1:, :, 7:8], edge)),
    ):
        assert torch.equal(whole[1:, :, 7:8], some)


def test_lag_hides_the_future():
    """With `lag = size - 1`, the scores of a query tile do not depend on queries after its first."""
    query, key = points(32, 32)
    centroids, size = torch.randn(KV_HEADS, 6, RANK), 8
    later = query.clone()
    later[:, :, 17:] = torch.randn(BATCH, HEADS, 15, RANK)
    scores = [
        clustering_scores(q, key, centroids, size=size, causal=True, lag=lag) for q in (query, later) for lag in (7, 0)
    ]
    assert torch.equal(scores[0][:, :, :3], scores[2][:, :, :3])  # tile 2 starts at 16
    assert not torch.equal(scores[1][:, :, 2], scores[3][:, :, 2])


@pytest.mark.parametrize("tokens", [13, 16, 3])
def test_balanced_clusters(tokens):
    key, centroids, valid = torch.randn(BATCH, KV_HEADS, tokens, RANK), torch.randn(KV_HEADS, 4, RANK), padding(tokens)
    width = balanced_width(tokens, 4, 2)
    assert width == math.ceil(2 * tokens / 4)
    found = assign_balanced(key.masked_fill(~valid[:, None, :, None], torch.nan), centroids, width, valid)
    for b in range(BATCH):
        real = [t for t in range(tokens) if valid[b, t]]
        for h in range(KV_HEADS):
            for c in range(4):
                order = sorted((float((key[b, h, t] - centroids[h, c]).square().sum()), t) for t in real)
                taken = {t for _, t in order[:width]}
                assert {t for t in range(tokens) if found[b, h, t, c] == c} == taken
                assert {t for t in range(tokens) if found[b, h, t, c] == -1} == set(range(tokens)) - taken
    edges = clustering_edges(key, key, centroids, top=2, balanced=True, causal=False, valid=valid)
    member = found >= 0
    expected = (member[..., :, None, :] & member[..., None, :, :]).any(-1)
    assert torch.equal(edges, expected)


def inertia(cloud, centroids) -> torch.Tensor:
    """Mean squared distance to the nearest centroid, `[H]`."""
    return (cloud[:, :, None] - centroids[:, None]).square().sum(-1).amin(-1).mean(-1)


class TestKmeans:
    def test_finds_separate_clusters(self):
        centre = torch.tensor([[[0.0, 0], [9, 0], [0, 9]], [[5, 5], [-5, 5], [5, -5]]])
        cloud = (centre[:, :, None] + 0.3 * torch.randn(2, 3, 40, 2)).flatten(1, 2)
        found = kmeans(cloud, 3, generator=torch.Generator().manual_seed(1))
        distance = (found[:, :, None] - centre[:, None]).norm(dim=-1)
        assert (distance.amin(1) < 0.2).all()

    def test_more_iterations_are_never_worse_and_end_at_the_means(self, monkeypatch):
        cloud = torch.randn(3, 200, 4, dtype=torch.float64)
        costs = []
        for iterations in (0, 1, 2, 5, 200):
            monkeypatch.setattr("hf_sparse.ops.graphs.kmeans._ITERATIONS", iterations)
            found = kmeans(cloud, 7, generator=torch.Generator().manual_seed(2))
            costs.append(inertia(cloud, found))
        assert all((late <= early + 1e-12).all() for early, late in itertools.pairwise(costs))
        nearest = (cloud[:, :, None] - found[:, None]).square().sum(-1).argmin(-1)
        for head in range(3):
            for cluster in range(7):
                torch.testing.assert_close(cloud[head, nearest[head] == cluster].mean(0), found[head, cluster])

    def test_the_same_seed_gives_the_same_centroids(self):
        cloud = torch.randn(2, 50, 3)
        seeds = (0, 0, 1)
        one, two, three = (kmeans(cloud, 5, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
        assert torch.equal(one, two) and not torch.equal(one, three)

    def test_no_cluster_stays_empty(self):
        """40 equal points and 4 others: seeds may fall on equal points, centroids must not."""
        cloud = torch.cat([torch.zeros(1, 40, 2), torch.tensor([[[50.0, 0], [51, 0], [0, 50], [0, 51]]])], 1)
        for seed in range(10):
            found = kmeans(cloud, 5, generator=torch.Generator().manual_seed(seed))
            assert inertia(cloud, found) == 0

    def test_equal_points(self):
        found = kmeans(torch.ones(1, 6, 2), 3)
        assert torch.equal(found, torch.ones(1, 3, 2))

    def test_as_many_clusters_as_points(self):
        cloud = torch.randn(2, 6, 3)
        assert (inertia(cloud, kmeans(cloud, 6)) == 0).all()


def test_training_points_are_those_of_each_group():
    query, key = points(9, 9)
    found = training_points(query, key)
    assert found.shape == (KV_HEADS, 3 * BATCH * 9, RANK)
    for head in range(KV_HEADS):
        parts = (query[:, 2 * head], query[:, 2 * head + 1], key[:, head])
        assert sorted(found[head].tolist()) == sorted(torch.cat(parts).flatten(0, 1).tolist())


@pytest.mark.parametrize("kind", ["clusters", "shared", "fixed"])
def test_no_buffer_of_queries_times_keys(kind, largest_tensor):
    """16 times the text, 16 times the largest tensor: what grows with its square is left out of tiles."""
    peaks = []
    for length in (1024, 16384):
        query, key = torch.randn(1, 1, length, 4), torch.randn(1, 1, length, 4)
        with largest_tensor() as largest:
            if kind == "clusters":
                clustering_scores(query, key, torch.randn(1, 16, 4), top=2, size=128, causal=True)
            elif kind == "shared":
                quantization_scores(query, key, torch.randn(1, 4, 15).sort(-1).values, size=128, causal=True)
            else:
                quantization_scores(query, key, width=16, size=128, causal=False)
        peaks.append(largest.numel)
    assert peaks[1] <= 16 * peaks[0]


class TestBadInput:
    query, key = torch.randn(1, 2, 8, 3), torch.randn(1, 2, 8, 3)

    def test_points(self):
        edge = torch.zeros(2, 3, 1)
        for query, key, message in (
            (self.query[..., :2], self.key, "same rank, got queries .*2.* and keys .*3"),
            (self.query[:, :1], self.key, "multiple of the KV heads"),
            (self.query, self.key[:, :, 1:], "Tq <= Tk"),
            (self.query[0], self.key, r"\[B, Hq, Tq, r\]"),
        ):
            for call in (
                lambda q, k: distance_edges(q, k, 1.0, causal=False),
                lambda q, k: quantization_edges(q, k, edge, causal=False),
                lambda q, k: clustering_scores(q, k, edge, size=4, causal=False),
            ):
                with pytest.raises(ValueError, match=message):
                    call(query, key)

    def test_not_fitted(self):
        with pytest.raises(ValueError, match="no centroids yet: fit them"):
            clustering_scores(self.query, self.key, None, size=4, causal=True)
        with pytest.raises(ValueError, match="no boundaries yet: fit them"):
            quantization_scores(self.query, self.key, None, size=4, causal=True)

    def test_fitted_for_another_model(self):
        with pytest.raises(ValueError, match=r"centroids \[H, C, 3\] with H a divisor of 2, got \(2, 5, 4\)"):
            clustering_edges(self.query, self.key, torch.zeros(2, 5, 4), causal=True)
        with pytest.raises(ValueError, match=r"boundaries \[H, 3, bins - 1\] with H a divisor of 2, got \(3, 3, 1\)"):
            quantization_edges(self.query, self.key, torch.zeros(3, 3, 1), causal=True)

    def test_clusters(self):
        with pytest.raises(ValueError, match="1 to 8 clusters of 8 points, got 9"):
            kmeans(self.key[0], 9)
        with pytest.raises(ValueError, match="finite points"):
            kmeans(self.key[0] * torch.nan, 2)
        with pytest.raises(ValueError, match="1 to 5 of the clusters, got top=6"):
            clustering_edges(self.query, self.key, torch.zeros(2, 5, 3), top=6, causal=True)
        with pytest.raises(ValueError, match="a causal model has not seen: use balanced=False"):
            clustering_edges(self.query, self.key, torch.zeros(2, 5, 3), balanced=True, causal=True)
        with pytest.raises(ValueError, match="3 queries of 8 keys"):
            clustering_edges(self.query[:, :, 5:], self.key, torch.zeros(2, 5, 3), balanced=True, causal=False)
        with pytest.raises(ValueError, match="at least 1 point, got width=0"):
            assign_balanced(self.key, torch.zeros(2, 5, 3), 0)

    def test_bins(self):
        with pytest.raises(ValueError, match=r"2 to N bins, got .* and 9 bins"):
            fit_boundaries(self.key[0], 9)
        with pytest.raises(ValueError, match="1 to 8 of 8 tokens, got 9"):
            quantization_edges(self.query, self.key, width=9, causal=False)
        with pytest.raises(ValueError, match="use shared bins"):
            quantization_scores(self.query, self.key, width=2, size=4, causal=True)
        with pytest.raises(ValueError, match="got both"):
            quantization_edges(self.query, self.key, torch.zeros(2, 3, 1), width=2, causal=False)
        with pytest.raises(ValueError, match="3 queries of 8 keys"):
            quantization_edges(self.query[:, :, 5:], self.key, width=2, causal=False)

    def test_tiles(self):
        with pytest.raises(ValueError, match="lag must be from 0 to 3"):
            clustering_scores(self.query, self.key, torch.zeros(2, 5, 3), size=4, causal=True, lag=4)
        with pytest.raises(ValueError, match="got size=0"):
            clustering_scores(self.query, self.key, torch.zeros(2, 5, 3), size=0, causal=True)
