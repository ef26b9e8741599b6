"""The codes of a cache stay those of its tokens, whatever transformers does with the rows."""

import copy
import weakref

import pytest
import torch

from hf_sparse.core.cache import ModelCall
from hf_sparse.methods.sparsefinder.cache import SparsefinderCacheLayer
from hf_sparse.methods.sparsefinder.rooms import ROOM

KEYS = torch.randn(3, 2, 12, 8, generator=torch.Generator().manual_seed(0))


def codes(keys):
    """Of 4 query heads and 2 KV heads: a function of each token alone."""
    of_keys = (keys[..., :3] * 10).long()
    return -of_keys.repeat_interleave(2, dim=1), of_keys


def feed(layer, begin, end, owner="me"):
    """One forward: the keys come, then their codes."""
    part = KEYS[:, :, begin:end]
    layer.update(part, -part)
    layer.begin_attention()
    found = layer.append(*codes(part), owner)
    layer.end_attention()
    return found


def filled(length=12):
    layer = SparsefinderCacheLayer()
    feed(layer, 0, length)
    return layer


def check(layer, keys):
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, -keys)
    assert all(map(torch.equal, (layer.query_codes, layer.key_codes), codes(keys)))


def test_prefill_and_steps_append():
    layer = SparsefinderCacheLayer()
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        found = feed(layer, begin, end)
        assert all(map(torch.equal, found, codes(KEYS[:, :, :end])))
        check(layer, KEYS[:, :, :end])
    assert layer.get_seq_length() == 12 and layer.get_mask_sizes(1) == (13, 0)


def test_tokens_that_came_without_codes_are_noticed():
    layer = filled(4)
    layer.update(KEYS[:, :, 4:9], -KEYS[:, :, 4:9])  # dense attention took these in
    with pytest.raises(ValueError, match=r"filled by dense or complete attention or with another .*: start a new"):
        feed(layer, 9, 10)


def test_codes_of_another_predictor_are_noticed():
    layer = filled(4)
    with pytest.raises(ValueError, match=r"with another adapter.*: start a new cache"):
        feed(layer, 4, 5, "you")


def test_rows_are_reordered():
    layer, order = filled(), torch.tensor([2, 0, 0])
    layer.reorder_cache(order)
    check(layer, KEYS[order])


def test_rows_are_repeated():
    layer = filled()
    layer.batch_repeat_interleave(2)
    check(layer, KEYS.repeat_interleave(2, dim=0))


def test_rows_are_selected():
    layer = filled()
    layer.batch_select_indices(torch.tensor([0, 2]))
    check(layer, KEYS[[0, 2]])


@pytest.mark.parametrize("length", [12, 7])
def test_the_last_tokens_are_cropped_and_come_again(length):
    layer = filled()
    layer.crop(length - 12)
    check(layer, KEYS[:, :, :length])
    feed(layer, length, 12)
    check(layer, KEYS)


def test_cropping_dense_tokens_away_makes_the_cache_whole_again():
    layer = filled(4)
    layer.update(KEYS[:, :, 4:9], -KEYS[:, :, 4:9])
    layer.crop(-5)
    feed(layer, 4, 12)
    check(layer, KEYS)


def test_reset_forgets_everything():
    layer = filled()
    layer.reset()
    assert layer.query_codes is None and layer.key_codes is None and layer.get_seq_length() == 0
    feed(layer, 0, 12, "you")
    check(layer, KEYS)


def test_texts_after_reset_have_other_rows_and_codes():
    layer = filled()
    layer.reset()
    layer.update(KEYS[:1], -KEYS[:1])
    of_queries, of_keys = (part[:1].float() + 0.5 for part in codes(KEYS))
    assert all(map(torch.equal, layer.append(of_queries, of_keys, "you"), (of_queries, of_keys)))


def test_room_for_more_tokens_is_given_back_when_a_second_turn_comes():
    layer = filled(4)
    with torch.no_grad():
        feed(layer, 4, 5)
        room = weakref.ref(layer.rooms[0])
        feed(layer, 5, 8)
        assert room() is None
        feed(layer, 8, 9)
    check(layer, KEYS[:, :, :9])


def test_an_empty_layer_takes_every_operation():
    layer = SparsefinderCacheLayer()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.crop(-1)
    layer.prefetch()
    layer.offload()
    layer.end_attention()
    layer.reset()
    assert layer.key_codes is None and layer.get_seq_length() == 0


def test_a_predictor_without_codes_has_an_ordinary_cache():
    layer = SparsefinderCacheLayer()
    layer.update(KEYS, -KEYS)
    layer.end_attention()
    layer.crop(-2)
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.key_codes is None and torch.equal(layer.keys, KEYS[1:2, :, :10])


def test_codes_follow_their_keys_off_the_device_and_back():
    def places(layer):
        return {tensor.device.type for tensor in (layer.keys, layer.query_codes, layer.key_codes)}

    layer = filled(5)
    layer.device = torch.device("meta")  # a device that the CPU's tensors are not on, and that any machine has
    layer.prefetch()
    assert places(layer) == {"meta"}
    layer = filled(5)
    layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")  # offloaded between update and attention
    layer.end_attention()
    assert places(layer) == {"meta"}
    layer = filled(5)
    layer.offload()
    check(layer, KEYS[:, :, :5])


def test_codes_of_a_growing_text_stay_where_they_are():
    layer = SparsefinderCacheLayer()
    with torch.inference_mode():
        feed(layer, 0, 4)
    feed(layer, 4, 5)
    place = layer.key_codes.data_ptr()
    for length in range(5, 8):
        feed(layer, length, length + 1)
        assert layer.key_codes.data_ptr() == place
    layer.crop(-2)
    feed(layer, 6, 9)
    assert layer.key_codes.data_ptr() == place
    check(layer, KEYS[:, :, :9])
    order = torch.tensor([1, 1, 0])
    layer.reorder_cache(order)
    part = KEYS[order, :, 9:]
    layer.update(part, -part)
    layer.append(*codes(part), "me")
    check(layer, KEYS[order])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_grows_by_itself(copied):
    layer = filled(8)
    with torch.no_grad():
        feed(layer, 8, 9)
        place = layer.keys.data_ptr()
        other = copied(layer)
        feed(layer, 9, 10)
        assert layer.keys.data_ptr() == place  # nothing was copied but the new token
        other.update(KEYS[:, :, 11:], -KEYS[:, :, 11:])
        other.append(*codes(KEYS[:, :, 11:]), "me")
    check(layer, KEYS[:, :, :10])
    check(other, torch.cat([KEYS[:, :, :9], KEYS[:, :, 11:]], 2))


def test_a_text_grows_in_place_after_any_change_of_its_rows():
    layer = filled(6)
    with torch.no_grad():
        feed(layer, 6, 7)
        layer.crop(-2)
        feed(layer, 5, 6)
        check(layer, KEYS[:, :, :6])
        layer.reorder_cache(torch.tensor([0, 1, 2]))
        feed(layer, 6, 7)
    feed(layer, 7, 12)
    check(layer, KEYS)
    layer.reset()
    feed(layer, 0, 12)
    check(layer, KEYS)


def test_attention_can_become_dense_and_sparse_again():
    """Another adapter may leave the layer out, and dense attention needs a mask in recorded steps."""
    layer, token = SparsefinderCacheLayer(), torch.zeros(1, 2, 1, 4)
    for is_dense in (False, True, False):
        for _ in range(2):  # the second finds room
            if not is_dense:
                layer.begin_attention()
            with torch.no_grad():
                layer.update(token, token)
            assert layer.is_dense is is_dense


@pytest.mark.parametrize("heads", [(2, 2, 2), (2, 1, 2)], ids=["alike", "of several shapes"])
def test_copies_of_texts_are_apart_and_have_room(heads):
    """The first tokens of what sources hold, with zeros behind; targets that have memory keep it."""
    sources, held, targets = ([SparsefinderCacheLayer() for _ in heads] for _ in range(3))
    for length in (30, 20):
        for layer, number in zip(sources, heads, strict=True):
            layer.reset()
            layer.update(*torch.randn(2, 3, number, length, 4))
        before = [layer.rooms for layer in held]
        SparsefinderCacheLayer.copy_texts(sources, held, length, 32)
        assert before[0] is None or all(layer.rooms is rooms for layer, rooms in zip(held, before, strict=True))
    SparsefinderCacheLayer.copy_texts(held, targets, 17)
    for layer in targets:
        layer.note_tokens(17)
    for layer, theirs in zip(targets, sources, strict=True):
        assert layer.get_seq_length() == 17 and layer.is_initialized
        for name, room in zip(("keys", "values"), layer.rooms, strict=True):
            assert torch.equal(getattr(layer, name), getattr(theirs, name)[:, :, :17])
            assert room.shape[2] == 17 + ROOM and not room[:, :, 17:].any()
    pieces = {room.untyped_storage().data_ptr() for layer in targets for room in layer.rooms}
    assert len(pieces) == (1 if len(set(heads)) == 1 else 6)
    targets[0].keys.zero_()
    assert all(layer.keys.any() for layer in targets[1:]) and targets[0].values.any() and held[0].keys.any()


def test_a_prompt_that_is_recorded_is_held_as_it_is():
    """Its keys are copied from there."""
    layer = SparsefinderCacheLayer()
    layer.call = ModelCall(end=torch.tensor([3]))
    key, value = torch.randn(2, 1, 2, 5, 4)
    found = layer.update(key, value)
    assert found[0] is layer.keys is key and found[1] is layer.values is value and layer.get_seq_length() == 5
