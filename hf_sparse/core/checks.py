"""Check the values of a configuration; a bool is no number here.

A configuration may come from a stranger's file: sizes have an upper end, so that none asks for memory that nobody has.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

#: The most of what is counted in tokens, keys, layers or bins.
MOST_TOKENS = 2**24

#: The largest width of a learned layer.
MOST_WIDTH = 2**16

#: The largest magnitude of a number that is not counted; float32 can still multiply two of them.
MOST = 1e9

_SHOWN = 80  # characters of a value in a message


def is_integer(value: Any, least: int, most: int = MOST_TOKENS) -> bool:
    """
    >>> is_integer(3, least=1), is_integer(0, least=1), is_integer(True, least=1), is_integer(3.0, least=1)
    (True, False, False, False)
    >>> is_integer(10**30, least=1)
    False
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_finite(value: Any) -> bool:
    """
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
    """Indices in order and each once; `None` if the value is no collection of at least one.

    >>> indices([2, 0, 2]), indices([]), indices(3), indices([-1])
    ([0, 2], None, None, None)
    """
    if not isinstance(value, Collection) or not value or not all(is_integer(index, 0) for index in value):
        return None
    return sorted(set(value))


def check_peft_fields(config: Any) -> None:
    """Check the fields that every configuration has, from PEFT or filled in when it is attached.

    Raises:
        ValueError: one of them is of another type, or a task that no model of ours is for.
    """
    from peft import TaskType  # late: those who check other settings need not wait for torch

    # PEFT's class for sequence to sequence asks the base model for an encoder and a decoder.
    tasks = [task.value for task in TaskType if task != TaskType.SEQ_2_SEQ_LM]
    base = getattr(config, "base_shape", None)
    targets = getattr(config, "target_modules", None)
    texts = ("base_model_name_or_path", "revision", "peft_version")
    rules = [
        *((name, "None or a string", isinstance(getattr(config, name, None), str | None)) for name in texts),
        *(
            (name, "True or False", isinstance(getattr(config, name), bool))
            for name in ("inference_mode", "saves_embeddings")
        ),
        ("auto_mapping", "None or an object", isinstance(config.auto_mapping, Mapping | None)),
        ("target_modules", "None, a name or names", targets is None or _are_names(targets)),
        ("base_shape", "None or an object", base is None or (isinstance(base, Mapping) and _are_names(list(base)))),
        ("task_type", f"None or one of {', '.join(tasks)}", config.task_type is None or config.task_type in tasks),
    ]
    for name, what, right in rules:
        if not right:
            raise ValueError(f"{type(config).__name__}.{name} must be {what}, got {shown(getattr(config, name))}")


def _are_names(value: Any) -> bool:
    """Tell whether a value is a string or a collection of strings."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)
    )
