"""Cache layers answer to what the patch asks of them."""

import inspect

import pytest
import torch
from transformers.cache_utils import CacheLayerMixin

import hf_sparse
from hf_sparse.core.cache import GrowingCacheLayer, SparseCacheLayer, mask_of_keys
from hf_sparse.core.registry import registered_methods

METHODS = registered_methods()


@pytest.mark.parametrize("name", METHODS)
def test_the_cache_layer_of_every_method_follows_the_protocol(name):
    layer = METHODS[name].layer
    asked = {name: member for name, member in vars(SparseCacheLayer).items() if inspect.isfunction(member)}
    asked = {name: member for name, member in asked.items() if not name.startswith("_")}
    assert {"begin_attention", "check_mask", "end_attention", "get_seq_length"} < set(asked)
    for kind in filter(None, (layer.cache_layer_type, layer.static_cache_layer_type)):
        assert issubclass(kind, CacheLayerMixin)
        for name, member in asked.items():
            assert list(inspect.signature(getattr(kind, name)).parameters) == list(inspect.signature(member).parameters)


def test_a_mask_has_a_column_for_each_key():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert mask_of_keys(mask, 5) is mask and mask_of_keys(None, 5) is None
    for keys in (4, 6):
        with pytest.raises(ValueError, match=f"must have a column for each of {keys} tokens, got 5"):
            mask_of_keys(mask, keys)


def test_a_growing_layer_keeps_all_keys_and_asks_for_a_mask_of_all():
    layer = GrowingCacheLayer()
    for length in (5, 2):
        layer.begin_attention()
        new = torch.randn(1, 2, length, 4)
        keys, _ = layer.update(new, new)
        mask = torch.ones(1, keys.shape[2], dtype=torch.bool)
        assert layer.check_mask(mask, length) is mask
        with pytest.raises(ValueError, match="must have a column for each of"):
            layer.check_mask(mask[:, 1:], length)
        layer.end_attention()
    assert layer.get_seq_length() == 7 and "grows" in layer.refusal_of_static()


def test_the_older_name_of_the_cache_is_the_same_class():
    assert hf_sparse.SparseKCache is hf_sparse.SparseCache
