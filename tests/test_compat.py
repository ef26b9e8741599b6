"""The reach into PEFT: it works on this version, twice is once, and a PEFT that moved is named."""

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hf_sparse._compat import extend_peft_type, register_with_peft
from hf_sparse.core.registry import registered_methods
from hf_sparse.errors import CompatibilityError
from hf_sparse.methods.sparsek import SparseKModel
from hf_sparse.methods.sparsek.config import SparseKConfig
from hf_sparse.tuner import register_method

pytestmark = pytest.mark.versions


@pytest.fixture
def new_type():
    """A name that PEFT does not know; whatever was added is taken out again."""
    name = "HF_SPARSE_TEST"
    yield name
    for table in (PeftType._member_map_, PeftType._value2member_map_):
        table.pop(name, None)
    if name in PeftType._member_names_:
        PeftType._member_names_.remove(name)
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        mapping.pop(name, None)


def test_the_member_behaves_like_the_enums_own(new_type):
    before = list(PeftType)
    member = extend_peft_type(new_type)
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member.name == member.value == member == new_type
    assert PeftType(new_type) is member and PeftType[new_type] is member
    assert list(PeftType) == [*before, member] and len(PeftType) == len(before) + 1
    assert {member: 1}[new_type] == 1 and PeftType.LORA is before[before.index("LORA")]


def test_extending_twice_is_extending_once(new_type):
    member = extend_peft_type(new_type)
    count = len(PeftType)
    assert extend_peft_type(new_type) is member
    assert len(PeftType) == count


def test_registering_twice_is_registering_once():
    count = len(PeftType)
    for method in registered_methods().values():
        assert register_method(register_method(method)) is method
    assert len(PeftType) == count
    for name, method in registered_methods().items():
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)] is method.config
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)] is method.tuner
        assert (method.tuner.prefix, method.tuner.__name__) == (method.prefix, f"{method.layer.label}Model")


@pytest.mark.parametrize("error", [TypeError("new signature"), ValueError("refused"), KeyError("gone")])
def test_a_peft_that_registers_differently_is_named(new_type, monkeypatch, error):
    def refuse(**kwargs):
        raise error

    monkeypatch.setattr(peft.utils, "register_peft_method", refuse)
    with pytest.raises(CompatibilityError, match=f"PEFT {peft.__version__} registers its methods in a way") as caught:
        register_with_peft(new_type, config=SparseKConfig, tuner=SparseKModel, prefix="sparsek_")
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, ImportError)
    assert str(caught.value).endswith("(pip install 'peft>=0.21,<0.22') or a newer hf-sparse.")


def test_a_peft_without_the_function_is_named(new_type, monkeypatch):
    monkeypatch.delattr(peft.utils, "register_peft_method")
    with pytest.raises(CompatibilityError, match="registers its methods in a way"):
        register_with_peft(new_type, config=SparseKConfig, tuner=SparseKModel, prefix="sparsek_")


@pytest.mark.parametrize("table", ["_member_map_", "_member_names_", "_value2member_map_"])
def test_an_enum_that_works_differently_is_named(new_type, monkeypatch, table):
    frozen = tuple(getattr(PeftType, table)) if table == "_member_names_" else None
    if table == "_member_map_":
        # PeftType.__members__ is a view of this table.
        frozen = dict(PeftType._member_map_)

        class Frozen(dict):
            def __setitem__(self, key, value):
                raise TypeError("closed")

        frozen = Frozen(frozen)
    if table == "_value2member_map_":

        class Deaf(dict):
            def __setitem__(self, key, value):
                pass

        frozen = Deaf(PeftType._value2member_map_)
    monkeypatch.setattr(PeftType, table, frozen)
    with pytest.raises(CompatibilityError, match="registers its methods in a way"):
        extend_peft_type(new_type)
