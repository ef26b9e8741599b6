"""Ranks of tiles in a kernel against those that plain PyTorch makes of the same codes."""

import pytest
import torch

from hf_sparse.core.layer import AttentionShape
from hf_sparse.methods.sparsefinder import SparsefinderConfig
from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters
from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor, Span
from hf_sparse.ops.predictors.projections import tile_means
from hf_sparse.ops.predictors.triton.cluster_ranks import cluster_ranks
from hf_sparse.ops.tiles.select import highest_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter")
SETTINGS = {
    "one list per query head": {"tile": 8, "query_tile": 1},
    "a list for a group": {"tile": 8, "query_tile": 1, "per_group": True},
    "tiles of queries, no profile": {"tile": 4, "query_tile": 2, "profile": False, "window": 9},
    "single keys": {"tile": 1, "tiles_per_query": 20, "window": 0, "global_tokens": 5},
    "budgets of heads": {"tile": 16, "head_budgets": True, "clusters": 5},
}


@pytest.mark.cross("values")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("keys", [1, 7, 150])
def test_lists_are_those_of_plain_pytorch(settings, keys):
    torch.manual_seed(0)
    config = SparsefinderConfig(**{"tiles_per_query": 3, "window": 1, "clusters": 6} | settings)
    shape = AttentionShape(32, 4, 2, 8, 0)
    learned = SparsefinderParameters(config, shape).to(DEVICE)
    learned.centroids.normal_()
    for name in ("profile", "budgets"):
        if hasattr(learned, name):
            getattr(learned, name).uniform_(0.01, 4.0)
    position = torch.tensor([keys - 1, keys // 2, 0], device=DEVICE)
    of_queries = torch.randn(3, 4, keys, config.rank, device=DEVICE)
    of_keys = torch.randint(-1, config.clusters, (3, 2, keys, 1), device=DEVICE)
    predictor, span = learned.predictor, Span(1, keys, True, position)
    assert isinstance(predictor, ProjectedPredictor)
    expected = ProjectedPredictor.step_lists(predictor, learned, of_queries, of_keys, position)
    size, rows = predictor.tiles
    ranks = cluster_ranks(
        tile_means(*predictor.described(of_queries, span), rows)[:, :, 0],
        of_keys,
        learned.centroids,
        learned.profile if config.profile else None,
        position,
        size=size,
        rows=rows,
        window=config.window,
        global_tokens=config.global_tokens,
        grouped=config.per_group,
    )
    own = position[:, None] // size
    lists = highest_ranks(ranks, predictor.tiles_per_query(learned, own, ranks.shape[3], span))
    assert lists.shape == expected.shape and torch.equal(lists.sort(-1).values, expected.sort(-1).values)
