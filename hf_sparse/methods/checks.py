"""What the values of a configuration are; a bool is no number here."""

import math
from collections.abc import Collection
from typing import Any


def is_integer(value: Any, least: int) -> bool:
    """
    >>> is_integer(3, least=1), is_integer(0, least=1), is_integer(True, least=1), is_integer(3.0, least=1)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: Any) -> bool:
    """
    >>> is_finite(0.5), is_finite(float("nan")), is_finite("0.5"), is_finite(10**400)
    (True, False, False, True)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def indices(value: Any) -> list[int] | None:
    """Indices in order and each once; `None` if the value is no collection of at least one.

    >>> indices([2, 0, 2]), indices([]), indices(3), indices([-1])
    ([0, 2], None, None, None)
    """
    if not isinstance(value, Collection) or not value or not all(is_integer(index, 0) for index in value):
        return None
    return sorted(set(value))
