"""Keep what follows from the settings and the scorer of a layer until one of these changes."""

import copy

import pytest
import torch

from hf_sparse import SparseKConfig, patch
from hf_sparse.core.cache import ModelCall
from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsek.known_layer import known_layer
from hf_sparse.patches import sparse_layers


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama(), SparseKConfig(k=8, window=12, sinks=2))


@pytest.fixture
def layer(model):
    return sparse_layers(model)[0]


def test_a_new_cache_layer_is_that_of_the_longer_way(layer):
    for _ in range(2):
        new = layer.cache_layer_in_call(ModelCall())
        expected = layer.cache_layer()
        own = {"call", "scoring", "number_in_call"}
        assert type(new) is type(expected)
        assert {name: value for name, value in vars(new).items() if name not in own} == vars(expected)


def test_what_is_known_stays(layer):
    known = known_layer(layer)
    assert known_layer(layer) is known is layer.known and known.to_read.budget == layer.budget


@pytest.mark.parametrize(
    "name, value",
    [("k", 9), ("window", 11), ("sinks", 1), ("pin_prompt", 4), ("position_slope", 0.5), ("slope_length", 64)],
)
def test_other_settings_are_noticed_and_so_is_their_end(layer, name, value):
    before = known_layer(layer)
    with override([layer.config], **{name: value}):
        known = known_layer(layer)
        assert known is not before and known.to_read.budget == layer.budget
        assert known.new_cache_layer().slots == layer.cache_layer().slots
    assert known_layer(layer) == before


def test_another_adapter_or_scorer_is_noticed(layer):
    before = known_layer(layer)
    scorer = layer.sparsek_scorer[layer.active]
    scorer.weight = torch.nn.Parameter(scorer.weight.detach().clone())
    after = known_layer(layer)
    assert after is not before
    layer.identities[layer.active] = "loaded anew"
    assert known_layer(layer).new_cache_layer().owner == ("loaded anew", None) != after.new_cache_layer().owner


def test_shares_of_heads_are_noticed(layer):
    before = known_layer(layer)
    with override([layer.config], head_shares=[[0.5, 1.5]] * 2):
        known = known_layer(layer)
    assert known.cache_type is not before.cache_type and known.to_read.counts == (18, 26)


def test_nothing_is_known_where_no_scorer_chooses_or_others_look_on(layer):
    layer.observer = lambda *_: None
    assert known_layer(layer) is None
    new = layer.cache_layer_in_call(ModelCall())
    assert new.scoring is None and new.call.kinds[0].scoring is None


def test_a_copy_looks_anew(model, layer):
    known_layer(layer)
    assert sparse_layers(copy.deepcopy(model))[0].known is None
