"""The way by which Sparsefinder attends, for each mode, predictor and number of tokens."""

import pytest
import torch

from hf_sparse import SparsefinderConfig
from hf_sparse.core.layer import AttentionShape
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.methods.sparsefinder.ways import Way, way_of

FEW, ALL, LISTED, GRAPH = Way.FEW_OVER_ALL_KEYS, Way.ALL_KEYS, Way.LISTED_TILES, Way.GRAPH
TILES = {"tile": 8, "tiles_per_query": 2, "clusters": 4}
KEYS = 24


def make(causal=True, **settings):
    module = SparsefinderAttention.for_shape(AttentionShape(16, 4, 2, 8, layer=0, causal=causal))
    module.add_adapter("default", SparsefinderConfig(**settings))
    return module.eval()


def tokens(queries, keys=KEYS):
    query, key = torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8)
    return NewTokens(query, key, key, torch.randn(1, queries, 16), None, 0.3)


@pytest.mark.parametrize(
    "settings, of_one, of_three, of_text",
    [
        (TILES, LISTED, GRAPH, GRAPH),
        (TILES | {"complete": True}, FEW, FEW, ALL),
        (TILES | {"tile": None, "tiles_per_query": None}, GRAPH, GRAPH, GRAPH),
        ({"predictor": "full"}, FEW, FEW, ALL),
        ({"predictor": "bound"}, FEW, FEW, GRAPH),
        ({"predictor": "pooled", "query_tile": 2, "exact_up_to": 0}, FEW, GRAPH, GRAPH),
        ({"predictor": "pooled", "query_tile": 1, "exact_up_to": 0}, GRAPH, GRAPH, GRAPH),
        ({"predictor": "pooled", "query_tile": 1, "exact_up_to": KEYS}, FEW, FEW, ALL),
        ({"predictor": "pooled", "query_tile": 32, "exact_up_to": 0}, FEW, FEW, ALL),
        (TILES | {"entmax_native": 1.5}, FEW, FEW, ALL),  # not fitted
    ],
)
def test_way_by_predictor_and_number_of_tokens(settings, of_one, of_three, of_text):
    module = make(**settings)
    with torch.no_grad():
        ways = [way_of(module, tokens(queries), None, None) for queries in (1, 3, KEYS)]
    assert ways == [of_one, of_three, of_text]


def test_a_gradient_needs_functions_that_have_one():
    for settings, expected in ((TILES, GRAPH), ({"predictor": "full"}, ALL), ({"predictor": "bound"}, GRAPH)):
        assert way_of(make(**settings), tokens(1), None, None) is expected


def test_training_is_over_all_keys_unless_a_cache_is_filled_without_gradients():
    module = make(**TILES).train()
    assert way_of(module, tokens(1), None, None) is ALL
    with torch.no_grad():
        assert way_of(module, tokens(1), None, None) is ALL
        assert way_of(module, tokens(1), object(), None) is LISTED


@pytest.mark.parametrize("changes", [{"observer": print}, {"pattern": print}])
def test_what_looks_at_the_graph_gets_one(changes):
    for settings in (TILES, {"predictor": "full"}, TILES | {"complete": True}):
        module = make(**settings)
        vars(module).update(changes)
        with torch.no_grad():
            assert way_of(module, tokens(1), None, None) is GRAPH


def test_encoders_and_certified_attention_take_no_step():
    encoder, certified = make(causal=False, **TILES), make(**TILES | {"complete": True})
    certified.certify = True
    with torch.no_grad():
        assert way_of(encoder, tokens(1), None, None) is GRAPH and way_of(certified, tokens(1), None, None) is GRAPH


def test_an_observer_sees_the_steps_in_a_static_cache():
    module = make(**TILES)
    text, step, scaling = tokens(KEYS, KEYS), tokens(1, 1), 0.3
    fit_predictors([module], lambda: module.attend(**text._asdict(), cache=None))
    outputs, seen = [], []
    for observer in (None, lambda *of_text: seen.append(of_text)):
        module.observer = observer
        cache = module.static_cache_layer(KEYS + 4)
        with torch.no_grad():
            for query, key, value, hidden_states, _, _ in (text, step):
                cache.begin_attention()
                keys, values = cache.update(key, value)
                options = {"hidden_states": hidden_states, "valid": None, "cache": cache, "scaling": scaling}
                output = module.attend(query, keys, values, **options)
                cache.end_attention()
        outputs.append(output)
    assert [(of_text.query.shape[2], graph is not None) for of_text, graph, _ in seen] == [(KEYS, True), (1, True)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
