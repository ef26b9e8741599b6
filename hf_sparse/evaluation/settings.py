"""Collect the options of measuring that only one method has, from keyword arguments."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from hf_sparse.core.registry import registered_methods
from hf_sparse.evaluation.base import AbstractEvaluation


def settings_from(evaluation: AbstractEvaluation, options: Mapping[str, Any]) -> Any:
    """Return the settings of a method with the options that were given; one that is `None` was not.

    Raises:
        TypeError: no method has an option of this name.
        ValueError: another method has it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = _names(evaluation)
    for name in [name for name in given if name not in known]:
        owners = [method for method in registered_methods().values() if name in _names(method.evaluation())]
        if not owners:
            similar = get_close_matches(name, known, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            raise TypeError(
                f"{name!r} is no option of measuring a {evaluation.name} model: expected {_listed(known)}{hint}"
            )
        raise ValueError(
            f"{name!r} is an option of {owners[0].name}: a {evaluation.name} model is measured with {_listed(known)}"
        )
    return evaluation.settings_type(**given)


def _names(evaluation: AbstractEvaluation) -> list[str]:
    return [field.name for field in fields(evaluation.settings_type)]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no options of its own"
