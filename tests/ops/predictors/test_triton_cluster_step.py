"""Steps over the tiles that clusters choose, in kernels, against plain PyTorch on the same tokens."""

import pytest
import torch

from hf_sparse.core.layer import AttentionShape
from hf_sparse.methods.sparsefinder import SparsefinderConfig
from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters
from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor, Span
from hf_sparse.ops.entmax.step import Scales, _plain
from hf_sparse.ops.predictors.projections import tile_means
from hf_sparse.ops.predictors.triton.cluster_step import ClusterStep, Lists, Projections, cluster_lists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"tiles": 4, "ranks": 16, "programs": 6}  # several rounds of each loop even at the lengths of these tests
pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter")
SETTINGS = {
    "one list per query head": {"tile": 8, "query_tile": 1},
    "a list for a group": {"tile": 8, "query_tile": 1, "per_group": True},
    "tiles of queries, no profile": {"tile": 4, "query_tile": 2, "profile": False, "window": 9},
    "single keys": {"tile": 1, "tiles_per_query": 20, "window": 0, "global_tokens": 5},
    "tiles of eight queries, one projection": {"tile": 16, "query_tile": 8, "shared_projection": True, "clusters": 5},
    "sparsemax": {"tile": 8, "query_tile": 1, "alpha": 2.0, "rank": 3},
    "alphas of heads": {"tile": 8, "query_tile": 1, "learn_alpha": True},
}


def learned_of(settings, dim=8):
    torch.manual_seed(0)
    config = SparsefinderConfig(**{"tiles_per_query": 3, "window": 1, "clusters": 6, "initial_scale": 2.0} | settings)
    learned = SparsefinderParameters(config, AttentionShape(32, 4, 2, dim, 0)).to(DEVICE).requires_grad_(False)
    learned.centroids.normal_()
    if hasattr(learned, "query_bias"):
        learned.query_bias.normal_(0, 0.3)
    if hasattr(learned, "profile"):
        learned.profile.uniform_(0.01, 4.0)
    return learned


def lists_of(config):
    return Lists(config.tile, config.rows, config.window, config.global_tokens, config.causal_tiles, config.per_group)


@pytest.mark.cross("values")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("keys", [1, 7, 150])
def test_lists_are_those_of_plain_pytorch(settings, keys):
    learned = learned_of(settings)
    config, predictor = learned.config, learned.predictor
    assert isinstance(predictor, ProjectedPredictor)
    position = torch.tensor([keys - 1, keys // 2, 0], device=DEVICE)
    of_queries = torch.randn(3, 4, keys, config.rank, device=DEVICE)
    of_keys = torch.randint(-1, config.clusters, (3, 2, keys, 1), device=DEVICE)
    expected = ProjectedPredictor.step_lists(predictor, learned, of_queries, of_keys, position)
    expected = torch.nn.functional.pad(expected, (0, config.causal_tiles - expected.shape[-1]), value=-1)
    points = tile_means(*predictor.described(of_queries, Span(1, keys, True, position)), config.rows)[:, :, 0]
    profile = learned.profile if config.profile else None
    for sizes in (SMALL, {}):
        lists = cluster_lists(points, of_keys, learned.centroids, profile, position, lists_of(config), **sizes)
        assert lists.shape == expected.shape and torch.equal(lists.sort(-1).values, expected.sort(-1).values)


def expected_of(learned, query, key, value, real):
    """Attend with the last of the tokens that are real, as if there were no other: `[Hq, D]` float64."""
    config, predictor = learned.config, learned.predictor
    if not real[-1]:
        return torch.zeros_like(query[:, -1]).double()
    query, key, value = (part[None, :, real] for part in (query, key, value))
    codes = predictor.query_codes(learned, query), predictor.key_codes(learned, key)
    position = torch.tensor([key.shape[2] - 1], device=DEVICE)
    index = ProjectedPredictor.step_lists(predictor, learned, *codes, position)
    tensors = [part.double() for part in (query[:, :, -1:], key, value)]
    scales = Scales.of(learned.alpha, 0.3 * learned.scale, tensors[0])
    numbers = scales.scale, scales.exponent, scales.kind, scales.factor, scales.is_log
    return _plain(*tensors, *numbers, True, None, None, index, config.tile)[0, :, 0]


@pytest.mark.cross("values")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("keys, dim, padding", [(1, 8, False), (43, 20, False), (75, 8, True), (72, 16, True)])
def test_a_step_is_that_of_plain_pytorch(settings, keys, dim, padding):
    learned = learned_of(settings, dim)
    config, predictor = learned.config, learned.predictor
    query, key, value = (torch.randn(3, heads, keys, dim, device=DEVICE) for heads in (4, 2, 2))
    real = torch.ones(3, keys, dtype=torch.bool, device=DEVICE)
    if padding:  # a text that begins late, one with holes, one whose newest token is padding
        real[0, : keys // 3] = False
        real[1, torch.arange(keys, device=DEVICE) % 5 == 2] = False
        real[1, -1], real[2, -1] = True, False
        query, key, value = (part.masked_fill(~real[:, None, :, None], torch.nan) for part in (query, key, value))
    expected = torch.stack([expected_of(learned, query[b], key[b], value[b], real[b]) for b in range(3)])
    of_queries, of_keys = predictor.query_codes(learned, query), predictor.key_codes(learned, key)
    order, position = None, None
    if padding:
        order = (~real).byte().argsort(dim=-1, stable=True)
        position = torch.where(real[:, -1], real.sum(-1), 0) - 1
    names = ("projection", "projection") if config.shared_projection else ("query_projection", "key_projection")
    of_query, of_key = (getattr(learned, name) for name in names)
    bias = None if config.shared_projection else learned.query_bias
    projections = Projections(of_query, bias, of_key, learned.centroids, learned.profile if config.profile else None)
    scales = Scales.of(learned.alpha, 0.3 * learned.scale, query)
    newest = key[:, :, -1:], value[:, :, -1:]
    usual = [{}] if DEVICE == "cuda" else []  # in the interpreter the steps of whole models have the usual sizes
    for sizes in (SMALL | {"gathered": 16}, *usual):
        rooms = [torch.full_like(torch.cat([part, part], 2), torch.nan) for part in (key, value)]
        code_rooms = [torch.cat([part, part], 2).fill_(7) for part in (of_queries, of_keys)]
        for room, part in zip((*rooms, *code_rooms), (key, value, of_queries, of_keys), strict=True):
            room[:, :, : keys - 1] = part[:, :, :-1]
        views = [room[:, :, :keys] for room in (*rooms, *code_rooms)]
        step = ClusterStep(
            query[:, :, -1:], *views[:2], lists_of(config), projections, kind=scales.kind, is_log=False, **sizes
        )
        output = step(
            query[:, :, -1:], *views[:2], newest, tuple(views[2:]), projections, scales.scale, scales.exponent, 1.0,
            order, position,
        )  # fmt: skip
        for view, part in zip(views[:3], (key, value, of_queries), strict=True):
            torch.testing.assert_close(view, part, equal_nan=True)
        coded = real if padding else real[:, -1:].expand_as(real)
        assert torch.equal(views[3][:, 0][coded], of_keys[:, 0][coded])
        assert output.shape == (3, 4, 1, dim) and output.is_contiguous()
        torch.testing.assert_close(output[:, :, 0].double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies no bfloat16")
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_half_precision_on_a_long_text(dim):
    """Codes near a boundary may differ, so the graph is compared by what little changes with it."""
    learned = learned_of({"tile": 8, "query_tile": 1, "tiles_per_query": 20, "window": 64}, dim)
    query, key, value = (torch.randn(3, heads, 9001, dim, device=DEVICE).bfloat16() for heads in (4, 2, 2))
    real = torch.ones(3, 9001, dtype=torch.bool, device=DEVICE)
    expected = torch.stack([expected_of(learned, query[b], key[b], value[b], real[b]) for b in range(3)])
    codes = learned.predictor.query_codes(learned, query), learned.predictor.key_codes(learned, key)
    projections = Projections(
        learned.query_projection, learned.query_bias, learned.key_projection, learned.centroids, learned.profile
    )
    scales = Scales.of_logarithm(1.5, 0.3, learned.log_scale)
    newest = key[:, :, -1:].clone(), value[:, :, -1:].clone()
    step = ClusterStep(query[:, :, -1:], key, value, lists_of(learned.config), projections, kind=2, is_log=True)
    for _ in range(3):  # the second is launched directly
        output = step(
            query[:, :, -1:], key, value, newest, codes, projections, scales.scale, None, scales.factor, None, None
        )
        difference = (output[:, :, 0].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(difference.max()) < 2e-2
