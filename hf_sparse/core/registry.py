"""List the methods there are. The module `method` of each registers it; all other code asks this list."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from hf_sparse.core.adapter_settings import LAST_FIELDS
from hf_sparse.core.config import SparseConfig
from hf_sparse.core.layer import SparseAttentionLayer


@dataclass(frozen=True)
class Method:
    """Describe one sparse attention method.

    Attributes:
        name: what the command line, the tags of cards and messages call it: a lower-case word.
        peft_type: its name in PEFT and in an `adapter_config.json`, such as `"HF_SPARSE_SPARSEK"`.
        config: the class of its configurations.
        layer: the class of what is attached to an attention module.
        tuner: the class that PEFT makes of a model and a configuration, a `hf_sparse.tuner.SparseModel` with this
            `prefix`.
        prefix: how the names of its learned containers begin, different from those of all other methods of PEFT.
        training: returns its `hf_sparse.finetune.stages.Training` class; imported when a model is trained.
        evaluation: returns its `hf_sparse.evaluation.Evaluation`; imported when a model is measured.
        report: returns its `hf_sparse.adapters.method_report.MethodReport`; imported when a card, a report or a push
            needs it.
    """

    name: str
    peft_type: str
    config: type[SparseConfig]
    layer: type[SparseAttentionLayer]
    tuner: type
    prefix: str
    training: Callable[[], Any]
    evaluation: Callable[[], Any]
    report: Callable[[], Any]


_METHODS: dict[str, Method] = {}


def add_method(method: Method) -> None:
    """Add a method to the list; `hf_sparse.tuner.register_method` makes it known to PEFT too.

    Raises:
        TypeError: its configuration lacks the fields that every configuration ends with.
        ValueError: another one has its name, its name in PEFT or its prefix.
    """
    names = tuple(field.name for field in fields(method.config))
    if names[-len(LAST_FIELDS) :] != LAST_FIELDS:
        raise TypeError(
            f"{method.config.__name__} must end with the fields {', '.join(LAST_FIELDS)} (see "
            f"hf_sparse.core.adapter_settings), got {', '.join(names[-len(LAST_FIELDS) :])}"
        )
    for other in _METHODS.values():
        for taken in (other.peft_type, other.name, other.prefix):
            if other != method and taken in (method.peft_type, method.name, method.prefix):
                raise ValueError(f"a method {taken!r} is registered already")
    _METHODS[method.peft_type] = method


def registered_methods() -> dict[str, Method]:
    """Return all methods by their name in PEFT."""
    return dict(_METHODS)


def method_of(config: object) -> Method:
    """Return the method that a configuration is for.

    Raises:
        TypeError: it is for none of them.
    """
    for method in _METHODS.values():
        if isinstance(config, method.config):
            return method
    raise TypeError(f"expected a {config_names()}, got {type(config).__name__}")


def config_names() -> str:
    """Name the classes of configurations in a message: `SparseKConfig or a SparsefinderConfig`, say."""
    return " or a ".join(method.config.__name__ for method in _METHODS.values())
