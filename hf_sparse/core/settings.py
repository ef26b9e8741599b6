"""Check the settings of a training run, and say what those of every method have in common.

Nothing here imports torch: the command line reads the fields of settings for its options and must not wait for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from hf_sparse.core.checks import is_finite

#: The most optimiser steps, chunks or queries that a setting may ask for.
MOST_STEPS = 10**7


@dataclass(frozen=True)
class TrainingSettings:
    """Hold the training settings of one method; its own class adds fields with defaults, and checks them.

    The `metadata` of a field has `"help"`, one sentence for the command line, and `"needs_lora": True` where it has no
    effect on an adapter without LoRA.

    Attributes:
        objectives: the objectives that only this method has, with a sentence on each.
    """

    objectives: ClassVar[Mapping[str, str]] = {}

    def check_objective(self, objective: str) -> None:
        """Raise `ValueError` for settings that cannot go with an objective."""


def values_of(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass with their values, these as they are.

    >>> @dataclass
    ... class Example:
    ...     steps: int = 3
    >>> values_of(Example())
    {'steps': 3}
    """
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


def check_integer(name: str, value: Any, least: int, most: int = MOST_STEPS) -> None:
    """Raise `ValueError` for a value that is no integer from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value!r}")


def check_number(name: str, value: Any, most: float, *, or_zero: bool = False) -> None:
    """Raise `ValueError` for a value that is no finite number above 0, or 0 where it may be, and at most `most`."""
    if not is_finite(value) or not (value >= 0 if or_zero else value > 0):
        raise ValueError(f"{name} must be a number {'at least 0' if or_zero else 'above 0'}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ValueError` for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
