"""Check the values of a configuration; a bool is no number here.

A configuration may come from a stranger's file: sizes have an upper end, so that none asks for memory that nobody has.
"""

import math
from collections.abc import Collection
from typing import Any

#: The most of what is counted in tokens, keys, layers or bins.
MOST_TOKENS = 2**24

#: The largest width of a learned layer.
MOST_WIDTH = 2**16

#: The largest magnitude of a number that is not counted; float32 can still multiply two of them.
MOST = 1e9

_SHOWN = 80  # characters of a value in a message


def is_integer(value: Any, least: int, most: int = MOST_TOKENS) -> bool:
    """Tell whether a value is an integer between two bounds, both included.

    >>> is_integer(3, least=1), is_integer(0, least=1), is_integer(True, least=1), is_integer(3.0, least=1)
    (True, False, False, False)
    >>> is_integer(10**30, least=1)
    False
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_finite(value: Any) -> bool:
    """Tell whether a value is a number that float32 can hold and multiply.

    >>> is_finite(0.5), is_finite(float("nan")), is_finite("0.5"), is_finite(1e30), is_finite(10**400)
    (True, False, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


def expected_integer(value: Any, least: int, most: int = MOST_TOKENS) -> str:
    """Say what was expected in place of a value that `is_integer` refuses.

    >>> expected_integer(0, 1), expected_integer(10**30, 1)
    ('an integer of at least 1', 'an integer of at most 16777216')
    """
    large = isinstance(value, int) and value > most
    return f"an integer of at {f'most {most}' if large else f'least {least}'}"


def expected_number(value: Any, what: str) -> str:
    """Say what was expected in place of a value that `is_finite` refuses, or that is no `what`.

    >>> expected_number("steep", "a finite number"), expected_number(1e30, "a finite number")
    ('a finite number', 'of a magnitude of at most 1e+09')
    """
    large = (
        isinstance(value, int | float)
        and not -MOST <= value <= MOST
        and (isinstance(value, int) or math.isfinite(value))
    )
    return f"of a magnitude of at most {MOST:.0e}" if large else what


def shown(value: Any) -> str:
    """Shorten the `repr` of a value to what a message has room for.

    >>> shown([1, 0]), len(shown("x" * 1000))
    ('[1, 0]', 83)
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in a list ...
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def indices(value: Any) -> list[int] | None:
    """Return indices in order and each once; `None` if the value is no collection of at least one.

    >>> indices([2, 0, 2]), indices([]), indices(3), indices([-1])
    ([0, 2], None, None, None)
    """
    if not isinstance(value, Collection) or not value or not all(is_integer(index, 0) for index in value):
        return None
    return sorted(set(value))
