"""Settings that are changed for the length of a block come back, whatever happens."""

from dataclasses import FrozenInstanceError, dataclass

import pytest
from torch import nn

from hf_sparse.core.overrides import override


@dataclass
class Settings:
    k: int = 188
    window: int = 64


@dataclass(frozen=True)
class FrozenSettings:
    k: int = 188


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.observer = None
        self.scorer = nn.Linear(2, 2)


def test_values_hold_within_the_block_alone():
    first, second = Settings(), Settings(k=7)
    with override([first, second], k=16, window=8):
        assert first == second == Settings(16, 8)
    assert (first, second) == (Settings(), Settings(k=7))


def test_values_come_back_after_an_error():
    settings = Settings()
    with pytest.raises(KeyError, match="within"), override([settings], k=1):
        raise KeyError("within")
    assert settings == Settings()


def test_what_the_block_itself_set_is_undone():
    settings = Settings()
    with override([settings], k=1):
        settings.k = 2
    assert settings == Settings()


def test_an_object_that_comes_twice_gets_its_own_value_back():
    settings = Settings()
    with override(iter([settings, settings]), k=1):  # one configuration belongs to all layers of a model
        assert settings.k == 1
    assert settings == Settings()


def test_blocks_nest():
    settings = Settings()
    with override([settings], k=1):
        with override([settings], k=2, window=3):
            assert settings == Settings(2, 3)
        assert settings == Settings(k=1)
    assert settings == Settings()


def test_nothing_is_changed_where_an_object_lacks_the_attribute():
    settings = Settings()
    with pytest.raises(AttributeError, match="slots"), override([settings], k=1, slots=2):
        pass
    assert settings == Settings()


def test_a_frozen_object_is_changed_and_stays_frozen():
    settings = FrozenSettings()
    with override([settings], k=1):
        assert settings.k == 1
        with pytest.raises(FrozenInstanceError):
            settings.k = 2
    assert settings == FrozenSettings()


def test_modules_keep_track_of_their_submodules():
    layer, other = Layer(), nn.Linear(2, 2)
    before = layer.scorer
    with override([layer], scorer=other, observer=print):
        assert layer.observer is print and list(layer.children()) == [other]
    assert layer.observer is None and list(layer.children()) == [before]
