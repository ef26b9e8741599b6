"""What is announced of a call of `generate` is known to one layer, and to none after the block."""

from hf_sparse.core.generation import Generation, announced, take_announcement


def test_the_first_layer_that_asks_takes_it():
    generation = Generation((), True, False)
    assert take_announcement() is None
    with announced(generation):
        assert take_announcement() is generation and take_announcement() is None
        with announced(generation):
            pass
        assert take_announcement() is None
    with announced(generation):
        pass
    assert take_announcement() is None
