"""Check that one layer takes what is announced of a call of `generate`, and none after the block."""

from typing import Any

from hf_sparse.core.generation import Generation, announced, take_announcement


def test_the_first_layer_that_asks_takes_it():
    layers: Any = [object(), object()]
    generation = Generation(layers, True, False)
    assert take_announcement(layers[0]) is None
    with announced(generation):
        assert take_announcement(object()) is None  # of another model, which runs within the prompt of this one
        assert take_announcement(layers[1]) is generation and take_announcement(layers[0]) is None
        with announced(generation):
            pass
        assert take_announcement(layers[0]) is None
    with announced(generation):
        pass
    assert take_announcement(layers[0]) is None
