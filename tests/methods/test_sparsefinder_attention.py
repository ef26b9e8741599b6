"""Sparsefinder on one attention module: what it attends to, in one piece or many, with padding or without."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import DynamicLayer

from hf_sparse import SparsefinderConfig
from hf_sparse.core.layer import AttentionShape
from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsefinder import (
    SparsefinderAttention,
    SparsefinderCacheLayer,
    attention,
    fit_predictors,
    padding,
)
from hf_sparse.methods.sparsefinder.predictors import projected
from hf_sparse.ops.entmax import entmax
from hf_sparse.ops.predictors.clustering import assign
from hf_sparse.ops.predictors.profile import distance_bins
from hf_sparse.ops.tiles import Tiles
from hf_sparse.ops.tiles.select import counts_for_sparsity
from hf_sparse.ops.tiles.tiles import own_tiles

HEADS, KV_HEADS, DIM = 4, 2, 8
SCALING = DIM**-0.5
LENGTH = 75  # no multiple of the tile
# Of 5 tiles, each query tile lists its own, the first, and a predicted one.
SIZES = {"tile": 16, "sparsity": 0.2, "length": LENGTH, "window": 1, "clusters": 6, "bins": 5, "bin_width": 4}

CAUSAL = {
    "clustering": {},
    "clustering, no tile is given": {"tiles_per_query": 2, "global_tokens": 0, "shared_projection": True},
    "clustering by group": {"per_group": True, "learn_alpha": True},
    "clustering of tokens": {"tile": None, "top_clusters": 1, "window": 0},
    "quantization": {"predictor": "quantization"},
    "quantization of tokens": {"predictor": "quantization", "tile": None},
    "distance": {"predictor": "distance"},
    "distance, a tile per token": {"predictor": "distance", "tile": 1, "tiles_per_query": 3},
    "clustering, tiles of 4": {"tile": 4, "tiles_per_query": 3},
    "distance of tokens": {"predictor": "distance", "tile": None, "threshold": 0.5},
    "clustering, a list per query": {"query_tile": 1},
    "clustering in parts": {"query_tile": 1, "cluster_parts": 4},
    "clustering in parts, by group": {"cluster_parts": 2, "per_group": True},
    "clustering by group, a list per query": {"query_tile": 1, "per_group": True},
    "quantization, a list per query": {"predictor": "quantization", "query_tile": 1, "tile": 8, "tiles_per_query": 4},
    "distance, a list per query": {"predictor": "distance", "query_tile": 1, "window": 9, "tiles_per_query": 4},
    "distance, a list for 4 queries": {"predictor": "distance", "query_tile": 4},
}
BUDGETS = {
    "budgets of heads": {"head_budgets": True, "predictor": "distance", "sparsity": 0.5},
    "budgets of heads, a tile per token": {"head_budgets": True, "predictor": "distance", "tile": 1, "sparsity": 0.7},
    "budgets of heads, by group": {"head_budgets": True, "per_group": True, "sparsity": 0.5},
    "budgets of heads, a list per query": {"head_budgets": True, "tile": 8, "query_tile": 1, "sparsity": 0.5},
}
EXACT = {
    "complete": {"complete": True, "sparsity": 0.9},
    "complete, a list per query": {"complete": True, "sparsity": 0.9, "query_tile": 1},
    "bound": {"predictor": "bound"},
    "bound, a list for 4 queries": {"predictor": "bound", "query_tile": 4},
    "full": {"predictor": "full"},
}
WHOLE = {
    "balanced clusters": {"balanced": True},
    "balanced clusters of tokens": {"balanced": True, "tile": None},
    "balanced clusters, a list per query": {"balanced": True, "query_tile": 1},
    "fixed bins": {"predictor": "quantization", "bin_kind": "fixed"},
    "fixed bins, a list for 2 queries": {"predictor": "quantization", "bin_kind": "fixed", "query_tile": 2},
    "fixed bins of tokens": {"predictor": "quantization", "bin_kind": "fixed", "tile": None},
}
PREDICTORS = {(name, causal): changes for causal in (True, False) for name, changes in (CAUSAL | EXACT).items()}
PREDICTORS |= {(name, False): changes for name, changes in WHOLE.items()}
#: What runs in both directions by default; the others are causal then.
BOTH = {*WHOLE, "clustering", "clustering of tokens", "clustering by group", "quantization, a list per query", "bound"}
BOTH |= {"distance", "complete, a list per query"}


def tensors(batch=2, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(batch, HEADS, length, DIM, generator=generator)
    key, value = (torch.randn(batch, KV_HEADS, length, DIM, generator=generator) for _ in range(2))
    return query, key, value


def attend(module, query, key, value, valid=None, cache=None):
    options = {"hidden_states": None, "valid": valid, "cache": cache, "scaling": SCALING}
    return module.attend(query, key, value, **options)


def build(causal=True, fitted=True, **changes):
    module = SparsefinderAttention.for_shape(AttentionShape(32, HEADS, KV_HEADS, DIM, layer=0, causal=causal))
    module.add_adapter("default", SparsefinderConfig(**{**SIZES, **changes}))
    module.eval()
    with torch.no_grad():
        learned = module.parameters_in_use
        learned.log_scale.add_(torch.tensor([0.1, 1.0, -0.4, 0.3]))
        if changes.get("learn_alpha"):
            learned.alpha_logit.add_(torch.tensor([-0.5, 1.0, 0.0, 0.2]))
    if fitted:
        fit_predictors([module], lambda: attend(module, *tensors(seed=1)), generator=torch.Generator().manual_seed(0))
    return module


@pytest.fixture(
    params=[
        pytest.param(
            (name, causal),
            id=f"{name}, {'causal' if causal else 'bidirectional'}",
            marks=[pytest.mark.full] * (not causal and name not in BOTH),
        )
        for name, causal in PREDICTORS
    ]
)
def any_module(request):
    return build(causal=request.param[1], **PREDICTORS[request.param])


@pytest.fixture(params=CAUSAL | EXACT | BUDGETS)
def causal_module(request):
    return build(**(CAUSAL | EXACT | BUDGETS)[request.param])


def reference(module, query, key, value, edges):
    learned = module.parameters_in_use
    logits = query @ key.repeat_interleave(HEADS // KV_HEADS, 1).transpose(-1, -2) * SCALING
    logits = (logits * learned.scale[:, None, None]).masked_fill(~edges, -torch.inf)
    alpha = learned.alpha if isinstance(learned.alpha, float) else learned.alpha[None, :, None, None]
    return entmax(logits, alpha) @ value.repeat_interleave(HEADS // KV_HEADS, 1)


def reached(causal):
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if causal else torch.ones(LENGTH, LENGTH).bool()


# What is attended.


@pytest.mark.cross
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("learn_alpha", [False, True])
def test_exact_predictors_are_entmax_over_all_keys(causal, exact, learn_alpha):
    module, inputs = build(causal, learn_alpha=learn_alpha, **EXACT[exact]), tensors()
    expected = reference(module, *inputs, reached(causal))
    torch.testing.assert_close(attend(module, *inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_complete_attention_predicts_no_graph_unless_it_is_observed(causal, pad):
    module, inputs, calls = build(causal, complete=True), tensors(), []
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :7] = not pad

    def predict(*arguments):
        calls.append(arguments)
        return type(predictor).graph(predictor, *arguments)

    predictor = module.parameters_in_use.predictor
    with override([predictor], graph=predict, query_codes=None):
        unobserved = attend(module, *inputs, valid=valid)
    with override([predictor], graph=predict):
        assert not calls
        module.observer = lambda text, graph, certificate: calls.append(certificate.exact)
        observed = attend(module, *inputs, valid=valid)
        assert len(calls) == (4 if pad else 2)  # one by one where there is padding
        module.observer, module.certify = None, True
        attend(module, *inputs)
    assert len(calls) == (5 if pad else 3)
    rows = valid[:, None, :, None].expand_as(observed)
    torch.testing.assert_close(unobserved[rows], observed[rows], rtol=0, atol=1e-5)


def test_a_cache_of_complete_attention_has_no_codes():
    module, (query, key, value) = build(complete=True, fitted=False), tensors()
    cache, first = module.make_cache_layer(), LENGTH - 5
    cache.update(key[:, :, :first], value[:, :, :first])
    attend(module, query[:, :, :first], key[:, :, :first], value[:, :, :first], cache=cache)
    keys, values = cache.update(key[:, :, first:], value[:, :, first:])
    found = attend(module, query[:, :, first:], keys, values, cache=cache)
    expected = reference(module, query, key, value, reached(True))[:, :, first:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert cache.key_codes is None
    module = build(complete=True)
    module.observer = lambda *found: None
    with pytest.raises(ValueError, match="filled by dense or complete attention"):
        attend(module, query[:, :, -1:], keys, values, cache=cache)


@pytest.mark.parametrize("causal", [True, False])
def test_tokens_with_a_common_cluster_are_joined(causal):
    module, (query, key, value) = build(causal, tile=None, window=5, global_tokens=2), tensors()
    learned = module.parameters_in_use
    of_query = assign(learned.project_queries(query), learned.centroids, 2)
    of_key = assign(learned.project_keys(key), learned.centroids, 2).repeat_interleave(HEADS // KV_HEADS, 1)
    joined = torch.zeros(2, HEADS, LENGTH, LENGTH, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, joined.shape)).tolist():
        batch, head, row, column = index
        near = row - 5 < column <= row if causal else row - 2 <= column <= row + 2
        clusters = set(of_query[batch, head, row].tolist()) & set(of_key[batch, head, column].tolist())
        joined[batch, head, row, column] = bool(clusters) or near or column < 2
    edges = joined & reached(causal)
    assert 0.3 < edges.sum() / reached(causal).expand_as(edges).sum() < 0.9
    expected = reference(module, query, key, value, edges)
    torch.testing.assert_close(attend(module, query, key, value), expected, rtol=0, atol=1e-5)


def test_tiles_are_as_many_as_wanted_and_the_observer_sees_them(causal_module):
    config, seen = causal_module.config, []
    causal_module.observer = lambda *found: seen.append(found)
    inputs = tensors()
    output = attend(causal_module, *inputs)
    ((text, graph, certificate),) = seen
    assert torch.equal(text.query, inputs[0]) and text.scaling.shape == (HEADS,) and text.causal and text.layer == 0
    assert (certificate is not None) == config.complete
    if config.predictor == "full":
        edges = reached(True)
    elif config.tile is None:
        edges = graph
        assert edges.shape == (2, HEADS, LENGTH, LENGTH)
    else:
        assert graph.index.shape[1] == (KV_HEADS if config.per_group else HEADS)
        if causal_module.parameters_in_use.predictor.learns_graph and not config.head_budgets:
            assert config.complete or config.causal_tiles == (config.tiles_per_query or 3)
            own = own_tiles(graph.counts.shape[2], LENGTH, config.tile, config.rows)
            wanted = (own + 1).clamp(max=config.causal_tiles)
            assert torch.equal(graph.counts, wanted.expand_as(graph.counts))
        used = certificate.tiles if config.complete else graph
        edges = used.edges(LENGTH, LENGTH, causal=True).repeat_interleave(HEADS // used.index.shape[1], 1)
    torch.testing.assert_close(output, reference(causal_module, *inputs, edges), rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("near, expected", [({"global_tokens": 17}, {0, 1}), ({"window": 20}, {1, 2})], ids=str)
def test_tiles_of_the_window_and_of_global_tokens_come_first(causal, near, expected):
    module, graphs = build(causal, tiles_per_query=3, **{"global_tokens": 0} | near), []
    module.observer = lambda text, graph, certificate: graphs.append(graph)
    attend(module, *tensors())
    assert all(expected <= set(tiles) for tiles in graphs[0].index[:, :, 2].flatten(0, 1).tolist())


@pytest.mark.parametrize("predictor", ["distance", "clustering", "clustering in parts"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_list_per_query_is_what_its_definition_says(predictor, causal):
    """Query by query: the tiles with the most of `profile(distance) * exp(-|q - k|^2)`, k a key or its centroid."""
    name, *parts = predictor.split(" in ")
    settings = {"cluster_parts": 2} if parts else {}
    module = build(causal, predictor=name, tile=8, query_tile=1, tiles_per_query=4, window=3, **settings)
    query, key, value = tensors(batch=1)
    graphs = []
    module.observer = lambda text, graph, certificate: graphs.append(graph)
    attend(module, query, key, value)
    learned = module.parameters_in_use
    of_query, of_key = learned.project_queries(query)[0], learned.project_keys(key)[0]
    if name == "clustering":
        found = []
        cut = (whole.chunk(1 + len(parts), -1) for whole in (of_key, learned.centroids))
        for points, centroids in zip(*cut, strict=True):
            nearest = (points[:, :, None] - centroids[:, None]).square().sum(-1).argmin(-1)
            found.append(torch.stack([centroids[head, nearest[head]] for head in range(KV_HEADS)]))
        of_key = torch.cat(found, -1)
    for head in range(HEADS):
        distance = (of_query[head][:, None] - of_key[head // 2][None]).square().sum(-1)
        least = 1e-30 if predictor == "clustering" else 0.0
        if predictor == "clustering":  # relative to the nearest centroid
            distance -= (of_query[head][:, None] - learned.centroids[head // 2]).square().sum(-1).amin(-1, keepdim=True)
        weight = (-distance.double()).exp().tolist()
        profile = learned.log_profile[head].exp()[distance_bins(torch.arange(10))].tolist()
        for t in range(LENGTH):
            near = [t - 2, t] if causal else [t - 1, t + 1]
            always = {0, *range(max(0, near[0]) // 8, min(LENGTH - 1, near[1]) // 8 + 1)} - {t // 8}
            tiles = range(t // 8 + 1 if causal else -(-LENGTH // 8))
            mass = {tile: max(least, sum(weight[t][tile * 8 : tile * 8 + 8])) for tile in tiles}
            score = {tile: math.log(mass[tile] * profile[abs(tile - t // 8)]) for tile in tiles}
            listed = {tile for tile in graphs[0].index[0, head, t].tolist() if tile >= 0}
            assert len(listed) == min(4, len(tiles)) and t // 8 in listed
            others = listed - always - {t // 8}
            assert always <= listed or not others
            left = [score[tile] for tile in tiles if tile not in listed]
            # Keys with the same centroids tie, but for the order in which they are summed.
            assert not others or not left or min(score[tile] for tile in others) > max(left) - 1e-4, (head, t)


def test_a_long_text_is_predicted_piece_by_piece(causal_module, monkeypatch):
    inputs = tensors()
    whole = attend(causal_module, *inputs)
    monkeypatch.setitem(projected._PAIRS, "cpu", 100)
    torch.testing.assert_close(attend(causal_module, *inputs), whole, rtol=0, atol=1e-5)


def test_an_encoder_has_the_wanted_sparsity():
    module, graphs = build(causal=False, sparsity=0.6), []
    module.observer = lambda text, graph, certificate: graphs.append(graph)
    attend(module, *tensors())
    wanted = counts_for_sparsity(torch.full((5,), 5), 0.6)
    assert wanted.sum() == 10 and torch.equal(graphs[0].counts, wanted.expand(2, HEADS, 5))


def test_rows_are_certified_when_wanted():
    module, seen = build(), []
    module.certify, module.observer = True, lambda *found: seen.append(found[2])
    inputs = tensors()
    output = attend(module, *inputs)
    exact = seen[0].exact
    assert exact.any() and not exact.all() and not seen[0].added.any()
    expected = reference(module, *inputs, reached(True))
    torch.testing.assert_close(output[exact], expected[exact], rtol=0, atol=1e-5)


def test_a_pattern_takes_the_place_of_the_prediction():
    module, inputs = build(fitted=False), tensors()
    own = torch.arange(5)[:, None].expand(2, HEADS, 5, 1)
    module.pattern = lambda text: Tiles(own.contiguous(), 16)
    edges = torch.arange(LENGTH)[:, None] // 16 == torch.arange(LENGTH) // 16
    expected = reference(module, *inputs, edges & reached(True))
    torch.testing.assert_close(attend(module, *inputs), expected, rtol=0, atol=1e-5)
    module.pattern = lambda text: edges
    torch.testing.assert_close(attend(module, *inputs), expected, rtol=0, atol=1e-5)


# One text in many forms.


@pytest.mark.cross("values")
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [40] + [1] * 35, [16, 1, 15, 43], [LENGTH - 1, 1]], ids=str)
def test_any_split_with_a_cache_equals_the_whole(causal_module, chunks):
    query, key, value = tensors()
    whole = attend(causal_module, query, key, value)
    cache, parts, begin = causal_module.cache_layer(), [], 0
    for length in chunks:
        new = slice(begin, begin + length)
        keys, values = cache.update(key[:, :, new], value[:, :, new])
        parts.append(attend(causal_module, query[:, :, new], keys, values, cache=cache))
        cache.end_attention()
        begin += length
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-5)


@pytest.mark.cross("values")
@pytest.mark.parametrize("at", [16, 50, LENGTH - 1])
def test_nothing_depends_on_later_tokens(causal_module, at):
    inputs, others = tensors(), tensors(seed=5)
    changed = [torch.cat([a[:, :, :at], b[:, :, at:]], 2) for a, b in zip(inputs, others, strict=True)]
    before, after = attend(causal_module, *inputs), attend(causal_module, *changed)
    torch.testing.assert_close(after[:, :, :at], before[:, :, :at], rtol=0, atol=1e-6)
    assert (after[:, :, at:] - before[:, :, at:]).abs().amax((0, 1, 3)).min() > 1e-3


MASKS = {
    "left": torch.arange(LENGTH) >= torch.tensor([0, 21, 70])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 33, 4])[:, None],
    "anywhere": torch.arange(LENGTH) % torch.tensor([80, 3, 2])[:, None] != 1,
}


@pytest.mark.cross("values")
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padding_equals_each_row_alone(any_module, side, training):
    """In float64 another graph, or one key more or less in a support, could not hide in rounding."""
    any_module.train(training)
    valid, inputs = MASKS[side], [t.double() for t in tensors(3)]
    padded = [t.masked_fill(~valid[:, None, :, None], torch.nan) for t in inputs]
    with torch.no_grad():
        together = attend(any_module, *padded, valid=valid)
        for row, real in enumerate(valid):
            alone = attend(any_module, *(t[row, None, :, real] for t in inputs))
            torch.testing.assert_close(together[row, None, :, real], alone, rtol=0, atol=1e-12)
            assert not together[row, :, ~real].any()


@pytest.mark.cross("values")
@pytest.mark.parametrize("side", MASKS)
def test_padding_with_a_cache(causal_module, side):
    """Steps of one token and of several, some of which are padding, and some rows of which have no token yet."""
    valid, (query, key, value) = MASKS[side], (t.double() for t in tensors(3))
    cache, begin, parts = causal_module.cache_layer(), 0, []
    for length in [50, 1, 1, 17, 1, 5]:
        new, seen = slice(begin, begin + length), slice(0, begin + length)
        keys, values = cache.update(key[:, :, new], value[:, :, new])
        parts.append(attend(causal_module, query[:, :, new], keys, values, valid=valid[:, seen], cache=cache))
        begin += length
    found = torch.cat(parts, 2)
    for row, real in enumerate(valid):
        alone = attend(causal_module, *(t[row, None, :, real] for t in (query, key, value)))
        torch.testing.assert_close(found[row, None, :, real], alone, rtol=0, atol=1e-12)
        assert not found[row, :, ~real].any()


def test_a_padded_batch_is_one_call(any_module, monkeypatch):
    batches = []

    def counted(function):
        return lambda query, *args, **options: batches.append(len(query)) or function(query, *args, **options)

    for name in ("entmax_attention", "certified_entmax_attention"):
        monkeypatch.setattr(attention, name, counted(getattr(attention, name)))
    attend(any_module, *tensors(3), valid=MASKS["left"])
    assert batches == [3]


@pytest.mark.parametrize("queries", [1, 5, LENGTH])
def test_packing_waits_for_no_value(queries):
    """Fake tensors have none: what asks for one raises."""
    with FakeTensorMode():
        valid, query = torch.ones(3, LENGTH, dtype=torch.bool), torch.ones(3, HEADS, queries, DIM)
        batch = padding.PackedBatch(valid, queries, 4)
        assert batch.unpack(batch.queries(query)).shape == query.shape
        assert batch.keys(torch.ones(3, KV_HEADS, LENGTH, DIM)).shape == (3, KV_HEADS, LENGTH, DIM)


def test_an_observer_sees_the_texts_of_a_padded_batch(any_module):
    inputs, seen, valid = tensors(3), [], MASKS["anywhere"]
    expected = attend(any_module, *inputs, valid=valid)
    any_module.observer = lambda text, graph, certificate: seen.append(text)
    torch.testing.assert_close(attend(any_module, *inputs, valid=valid), expected, rtol=0, atol=1e-5)
    assert [text.key.shape[2] for text in seen] == valid.sum(-1).tolist()
    assert all(torch.equal(text.key, inputs[1][row, None, :, valid[row]]) for row, text in enumerate(seen))


def test_half_precision_is_only_that_of_input_and_output(any_module):
    inputs = [t.bfloat16() for t in tensors()]
    expected = attend(any_module, *(t.float() for t in inputs))
    found = attend(any_module, *inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16())


# Learning.


@pytest.mark.parametrize("training", [True, False], ids=["full", "predicted"])
def test_scales_and_alphas_are_learned(training):
    module = build(learn_alpha=True).train(training)
    learned = module.parameters_in_use
    attend(module, *tensors()).square().sum().backward()
    assert learned.log_scale.grad.abs().min() > 0 and learned.alpha_logit.grad.abs().min() > 0
    assert learned.query_projection.grad is None


def test_training_attends_to_all_keys():
    module, inputs = build(fitted=False).train(), tensors()
    expected = reference(module, *inputs, reached(True))
    torch.testing.assert_close(attend(module, *inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9])
def test_alpha_starts_where_it_is_set(alpha):
    module = SparsefinderAttention.for_shape(AttentionShape(32, HEADS, KV_HEADS, DIM, 0))
    module.add_adapter("a", SparsefinderConfig(alpha=alpha, learn_alpha=True, initial_scale=0.25))
    torch.testing.assert_close(module.parameters_in_use.alpha, torch.full((HEADS,), alpha))
    torch.testing.assert_close(module.parameters_in_use.scale, torch.full((HEADS,), 0.25))


def test_separate_projections_start_as_a_shared_one():
    learned = build(fitted=False).parameters_in_use
    shared = build(fitted=False, shared_projection=True).parameters_in_use
    assert {n: tuple(p.shape) for n, p in shared.named_parameters()} == {"log_scale": (4,), "projection": (2, 8, 4)}
    with torch.no_grad():
        shared.projection.copy_(learned.key_projection)
    query, key, _ = tensors()
    assert torch.equal(learned.project_queries(query), shared.project_queries(query))
    assert torch.equal(learned.project_keys(key), shared.project_keys(key))


def test_nothing_is_projected_where_nothing_is_predicted():
    learned = build(predictor="bound").parameters_in_use
    assert [name for name, _ in learned.named_parameters()] == ["log_scale"] and not list(learned.buffers())


def test_fitting_restores_what_was_set():
    module, marks = build(fitted=False), (lambda text: None, lambda *found: None)
    module.pattern, module.observer = marks
    with pytest.raises(KeyError):
        fit_predictors([module], lambda: {}["missing"])
    assert (module.pattern, module.observer) == marks
    assert module.parameters_in_use.centroids.isnan().all()


def test_buffers_are_looked_at_again_when_they_have_changed(monkeypatch):
    learned, looks = build().parameters_in_use, []
    isnan = torch.Tensor.isnan
    monkeypatch.setattr(torch.Tensor, "isnan", lambda tensor: looks.append(tensor) or isnan(tensor))
    learned.check_fitted()
    count = len(looks)
    learned.check_fitted()
    assert len(looks) == count
    learned.centroids[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="this clustering predictor was never fitted, it has no centroids"):
        learned.check_fitted()
    learned.centroids = torch.zeros_like(learned.centroids)
    learned.check_fitted()
    learned.centroids = torch.full_like(learned.centroids, torch.nan)
    with pytest.raises(ValueError, match="it has no centroids"):
        learned.check_fitted()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clusters": 40}, "1 to 12 clusters of 12 points, got 40"),
        ({"predictor": "quantization", "bins": 40}, "2 to N bins, got .* 40 bins"),
    ],
)
def test_too_little_text_to_fit_is_refused(settings, message):
    module = build(fitted=False, **settings)
    with pytest.raises(ValueError, match=message):
        fit_predictors([module], lambda: attend(module, *tensors(1, 12)))
    with pytest.raises(ValueError, match="expected `read` to run the model on text"):
        fit_predictors([module], lambda: None)


# What is refused.


@pytest.mark.parametrize("predictor, what", [("clustering", "centroids"), ("quantization", "boundaries")])
def test_a_predictor_that_was_never_fitted_is_refused(predictor, what):
    module = build(fitted=False, predictor=predictor)
    with pytest.raises(
        ValueError,
        match=rf"this {predictor} predictor was never fitted, it has no {what}: train the adapter .*finetune",
    ):
        attend(module, *tensors())


def test_settings_that_do_not_fit_the_model_are_refused():
    shape = AttentionShape(32, HEADS, KV_HEADS, DIM, layer=0, causal=True)
    with pytest.raises(ValueError, match="rank must be at most the size of a head, 8, got 9"):
        SparsefinderAttention.check(SparsefinderConfig(rank=9), shape, num_layers=2)
    with pytest.raises(ValueError, match="a causal model has not seen: use bin_kind='shared' and balanced=False"):
        SparsefinderAttention.check(SparsefinderConfig(balanced=True), shape, num_layers=2)


def test_an_encoder_has_no_cache():
    module = build(causal=False)
    with pytest.raises(ValueError, match="has no KV cache"):
        module.cache_layer()
    with pytest.raises(ValueError, match="has no KV cache"):
        attend(module, *tensors(), cache=SparsefinderCacheLayer())


def test_another_cache_or_a_short_mask_is_refused():
    module = build()
    with pytest.raises(TypeError, match="needs a SparsefinderCacheLayer as its cache layer, got DynamicLayer"):
        attend(module, *tensors(), cache=DynamicLayer())
    with pytest.raises(ValueError, match="must cover all 75 keys, got 1 columns"):
        attend(module, *tensors(), valid=torch.ones(2, 1, dtype=torch.bool))


def test_a_cache_of_another_adapter_is_refused():
    module = build()
    module.add_adapter("other", SparsefinderConfig(**SIZES))
    query, key, value = tensors()
    cache = module.cache_layer()
    keys, values = cache.update(key[:, :, :50], value[:, :, :50])
    attend(module, query[:, :, :50], keys, values, cache=cache)
    module.set_adapter("other")
    keys, values = cache.update(key[:, :, 50:], value[:, :, 50:])
    with pytest.raises(ValueError, match="start a new cache after switching adapters"):
        attend(module, query[:, :, 50:], keys, values, cache=cache)


def test_bins_larger_than_the_text_are_refused():
    module = build(causal=False, predictor="quantization", bin_kind="fixed", bin_width=20)
    with pytest.raises(ValueError, match="a bin must hold 1 to 12 of 12 tokens, got 20"):
        attend(module, *tensors(length=12))
    with pytest.raises(ValueError, match="a bin must hold 1 to 19 of 19 tokens, got 20"):
        attend(module, *tensors(), valid=torch.arange(LENGTH) < torch.tensor([[LENGTH], [19]]))
