"""What predictors compare, against loops over tokens and pairs of tokens."""

import itertools
import math

import pytest
import torch

from hf_sparse.ops.predictors.buckets import bucket_edges, described_counts, key_counts, matching_pairs, query_counts
from hf_sparse.ops.predictors.clustering import (
    assign,
    assign_balanced,
    balanced_width,
    training_points,
)
from hf_sparse.ops.predictors.distance import squared_distances, tile_log_mass
from hf_sparse.ops.predictors.kmeans import kmeans
from hf_sparse.ops.predictors.projections import check_points, tile_means
from hf_sparse.ops.predictors.quantization import (
    fit_boundaries,
    fixed_bin_pairs,
    fixed_bins,
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


def poisoned(tensor, valid):
    """Padding holds NaN."""
    return tensor.masked_fill(~valid[:, None, :, None], torch.nan)


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


def shared(of_query, of_key) -> torch.Tensor:
    """Buckets that each query and key share, `[B, H, Tq, Tk]`; -1 is none."""
    of_key = of_key.repeat_interleave(HEADS // KV_HEADS, 1)
    pairs = of_query[..., :, None, :, None] == of_key[..., None, :, None, :]
    return (pairs & (of_query[..., :, None, :, None] >= 0)).sum((-2, -1)).float()


def test_distances_are_those_of_each_pair():
    query, key = points(4, 13)
    found = squared_distances(query, key)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        torch.testing.assert_close(found[b, h, i, j], (query[b, h, i] - key[b, h // 2, j]).square().sum())


@pytest.mark.parametrize("padded", [True, False])
def test_the_mass_of_a_tile_is_the_sum_over_its_keys(padded):
    query, key = points(3, 13)
    valid = padding(13) if padded else None
    found = tile_log_mass(query, key, 4, valid)
    real = torch.ones(BATCH, 13) if valid is None else valid.float()
    mass = (-squared_distances(query, key).double()).exp() * real[:, None, None]
    mass = torch.nn.functional.pad(mass, (0, 3)).unflatten(3, (4, 4)).sum(4)
    assert (mass == 0).any() == padded  # the first row begins with a tile of padding
    torch.testing.assert_close(found.double().exp(), mass, rtol=1e-5, atol=1e-12)


def test_tiles_are_described_by_the_queries_that_exist():
    query, exists = torch.randn(BATCH, HEADS, 12, RANK), torch.rand(BATCH, 12) < 0.6
    exists[1, 4:8] = False
    found = tile_means(poisoned(query, exists), exists, 4)
    ids = torch.randint(5, (BATCH, HEADS, 12, 2))
    counts = described_counts(ids, exists, 5, 4)
    for b, h, tile in itertools.product(range(BATCH), range(HEADS), range(3)):
        real = [t for t in range(4 * tile, 4 * tile + 4) if exists[b, t]]
        mean = query[b, h, real].mean(0) if real else torch.zeros(RANK)
        torch.testing.assert_close(found[b, h, tile], mean)
        assert torch.equal(counts[b, h, tile], torch.bincount(ids[b, h, real].flatten(), minlength=5).float())


@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (4, 13)])
def test_a_bin_lies_between_its_boundaries(queries, keys):
    edge = torch.randn(KV_HEADS, RANK, 4).sort(-1).values
    for tensor in points(queries, keys):
        found = shared_bins(tensor, edge)
        for b, h, t, d in torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist():
            above = sum(float(tensor[b, h, t, d]) >= float(at) for at in edge[h * KV_HEADS // tensor.shape[1], d])
            assert found[b, h, t, d] == 5 * d + above


@pytest.mark.parametrize("top", [1, 2, 5])
def test_clusters_are_the_nearest(top):
    centroids = torch.randn(KV_HEADS, 5, RANK)
    for tensor in points(4, 13):
        found = assign(tensor, centroids, top)
        for b, h, t in torch.cartesian_prod(*map(torch.arange, tensor.shape[:3])).tolist():
            distance = (centroids[h * KV_HEADS // tensor.shape[1]] - tensor[b, h, t]).square().sum(-1)
            assert found[b, h, t].tolist() == distance.argsort()[:top].tolist()


def test_pairs_with_a_common_bucket_are_joined():
    of_query, of_key = torch.randint(-1, 6, (BATCH, HEADS, 4, 2)), torch.randint(-1, 6, (BATCH, KV_HEADS, 13, 3))
    assert torch.equal(bucket_edges(of_query, of_key, 6), shared(of_query, of_key) > 0)


def test_disjoint_clusters_never_match_not_even_on_the_diagonal():
    centroids = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    query, key = torch.zeros(1, 1, 6, 1), torch.full((1, 1, 6, 1), 10.2)
    assert not bucket_edges(assign(query, centroids, 2), assign(key, centroids, 2), 4).any()
    # First of one and second of the other.
    assert bucket_edges(assign(query + 0.4, centroids, 2), assign(key * 0 + 0.6, centroids, 2), 4).all()


@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_fixed_bins(width):
    valid = padding(13)
    for tensor in points(13, 13):
        ids, buckets = fixed_bins(poisoned(tensor, valid), width, valid)
        bins = -(-13 // width)
        assert buckets == RANK * bins
        for b, h, d in itertools.product(range(BATCH), range(tensor.shape[1]), range(RANK)):
            expected = torch.full((13,), -1)
            order = sorted((float(tensor[b, h, t, d]), t) for t in range(13) if valid[b, t])
            for place, (_, t) in enumerate(order):
                expected[t] = d * bins + place // width
            assert torch.equal(ids[b, h, :, d], expected)


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
@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
def test_the_score_of_two_tiles_is_the_number_of_matching_pairs(queries, keys, size, lag, per_group):
    of_query, of_key = (
        torch.randint(-1, 5, (BATCH, HEADS, queries, 2)),
        torch.randint(-1, 5, (BATCH, KV_HEADS, keys, 2)),
    )
    lag = size - 1 if lag == "before" else 0
    counts = query_counts(of_query, 5, keys=keys, size=size, lag=lag), key_counts(of_key, 5, size=size)
    expected = pairs_of_tiles(shared(of_query, of_key), size, lag)
    if per_group:
        expected = expected.unflatten(1, (KV_HEADS, -1)).sum(2)
    assert torch.equal(matching_pairs(*counts, per_group=per_group), expected)


@pytest.mark.parametrize("rows", [4, 2, 1])
@pytest.mark.parametrize("padded", [True, False])
def test_pairs_of_fixed_bins(rows, padded):
    query, key = points(29, 29)
    valid = padding(29) if padded else torch.ones(BATCH, 29, dtype=torch.bool)
    ids = [fixed_bins(tensor, 3, valid)[0] for tensor in (query, key)]
    matches = torch.nn.functional.pad(shared(*ids), (0, 3, 0, 3))
    expected = matches.unflatten(3, (8, 4)).unflatten(2, (32 // rows, rows)).sum((3, 5))[:, :, : -(-29 // rows)]
    found = fixed_bin_pairs(poisoned(query, valid), poisoned(key, valid), 3, 4, rows, valid if padded else None)
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
    """With `lag = size - 1`, the counts of a query tile do not depend on queries after its first."""
    ids = torch.randint(5, (BATCH, HEADS, 32, 1))
    later = ids.clone()
    later[:, :, 17:] = torch.randint(5, (BATCH, HEADS, 15, 1))
    counts = [query_counts(of, 5, keys=32, size=8, lag=lag) for of in (ids, later) for lag in (7, 0)]
    assert torch.equal(counts[0][:, :, :3], counts[2][:, :, :3])  # tile 2 starts at 16
    assert not torch.equal(counts[1][:, :, 2], counts[3][:, :, 2])


@pytest.mark.parametrize("per_text", [True, False])
@pytest.mark.parametrize("tokens", [13, 16, 3])
def test_balanced_clusters(tokens, per_text):
    key, centroids, valid = torch.randn(BATCH, KV_HEADS, tokens, RANK), torch.randn(KV_HEADS, 4, RANK), padding(tokens)
    width = balanced_width(valid.sum(-1) if per_text else tokens, 4, 2)
    widths = torch.as_tensor(width).expand(BATCH).tolist()
    assert widths == [max(1, math.ceil(2 * int(n) / 4)) for n in (valid.sum(-1) if per_text else [tokens] * BATCH)]
    found = assign_balanced(poisoned(key, valid), centroids, width, valid)
    for b in range(BATCH):
        real = [t for t in range(tokens) if valid[b, t]]
        for h in range(KV_HEADS):
            for c in range(4):
                order = sorted((float((key[b, h, t] - centroids[h, c]).square().sum()), t) for t in real)
                taken = {t for _, t in order[: widths[b]]}
                assert {t for t in range(tokens) if found[b, h, t, c] == c} == taken
                assert {t for t in range(tokens) if found[b, h, t, c] == -1} == set(range(tokens)) - taken


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
            monkeypatch.setattr("hf_sparse.ops.predictors.kmeans._ITERATIONS", iterations)
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


def test_no_buffer_of_queries_times_keys(largest_tensor):
    """16 times the text, 16 times the largest tensor: what grows with its square is left out of tiles."""
    peaks = []
    for length in (1024, 16384):
        query, key = torch.randn(1, 1, length, 4), torch.randn(1, 1, length, 4)
        with largest_tensor() as largest:
            fixed_bin_pairs(query, key, 16, 128, 128)
            ids = [shared_bins(tensor, torch.randn(1, 4, 15).sort(-1).values) for tensor in (query, key)]
            matching_pairs(query_counts(ids[0], 64, keys=length, size=128), key_counts(ids[1], 64, size=128))
        peaks.append(largest.numel)
    assert peaks[1] <= 16 * peaks[0]


class TestBadInput:
    query, key = torch.randn(1, 2, 8, 3), torch.randn(1, 2, 8, 3)

    def test_points(self):
        for query, key, message in (
            (self.query[..., :2], self.key, "same rank, got queries .*2.* and keys .*3"),
            (self.query[:, :1], self.key, "multiple of the KV heads"),
            (self.query, self.key[:, :, 1:], "Tq <= Tk"),
            (self.query[0], self.key, r"\[B, Hq, Tq, r\]"),
        ):
            for call in (check_points, training_points, lambda q, k: fixed_bin_pairs(q, k, 2, 4, 4)):
                with pytest.raises(ValueError, match=message):
                    call(query, key)

    def test_not_fitted(self):
        with pytest.raises(ValueError, match="expected fitted centroids, got None: fit them"):
            assign(self.key, None)
        with pytest.raises(ValueError, match="expected fitted boundaries, got None: fit them"):
            shared_bins(self.key, None)

    def test_fitted_for_another_model(self):
        with pytest.raises(ValueError, match=r"centroids \[H, C, 3\] with H a divisor of 2, got \(2, 5, 4\)"):
            assign(self.key, torch.zeros(2, 5, 4))
        with pytest.raises(ValueError, match=r"boundaries \[H, 3, bins - 1\] with H a divisor of 2, got \(3, 3, 1\)"):
            shared_bins(self.key, torch.zeros(3, 3, 1))

    def test_clusters(self):
        with pytest.raises(ValueError, match="1 to 8 clusters of 8 points, got 9"):
            kmeans(self.key[0], 9)
        with pytest.raises(ValueError, match="finite points"):
            kmeans(self.key[0] * torch.nan, 2)
        with pytest.raises(ValueError, match="1 to 5 of the clusters, got top=6"):
            assign(self.key, torch.zeros(2, 5, 3), top=6)
        with pytest.raises(ValueError, match="at least 1 point, got width=0"):
            assign_balanced(self.key, torch.zeros(2, 5, 3), 0)

    def test_bins(self):
        with pytest.raises(ValueError, match=r"2 to N bins, got .* and 9 bins"):
            fit_boundaries(self.key[0], 9)
        with pytest.raises(ValueError, match="1 to 8 of 8 tokens, got 9"):
            fixed_bins(self.key, 9)
        with pytest.raises(ValueError, match="1 to 5 of 5 tokens, got 6"):
            fixed_bin_pairs(self.query, self.key, 6, 4, 4, torch.arange(8)[None] < 5)

    def test_tiles(self):
        ids = torch.zeros(1, 2, 8, 1, dtype=torch.int64)
        with pytest.raises(ValueError, match="lag must be from 0 to 3"):
            query_counts(ids, 5, keys=8, size=4, lag=4)
        with pytest.raises(ValueError, match="got size=0"):
            query_counts(ids, 5, keys=8, size=0)
