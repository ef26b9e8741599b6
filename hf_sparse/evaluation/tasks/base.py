"""Define what a task is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from hf_sparse.evaluation.tasks.haystack import Haystack


@dataclass(frozen=True)
class Draft:
    """Hold one example whose length is still open.

    Attributes:
        render: the prompt with `n` units of filler (sentences, or words of a list); more units, more tokens.
        answers: the expected answers.
    """

    render: Callable[[int], str]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Describe a kind of examples that are made from a seed, and how an answer to one is scored.

    Attributes:
        name: in the registry, on the command line and in eval.json.
        metric: name of a score; each is in `[0, 1]`, and more is better.
        depths: whether a needle's depth matters: `"each"` has an example per depth, `"all"` one needle at every depth
            of the same example, `"none"` no depth.
        make: `(random, haystack, depths)` to a draft. Depths are shares of the text, 0 the beginning; empty for
            `"none"`, and one for `"each"`.
        score: `(generated text, answers)` to a score per answer.
    """

    name: str
    metric: str
    depths: Literal["each", "all", "none"]
    make: Callable[[Random, Haystack, Sequence[float]], Draft]
    score: Callable[[str, Sequence[str]], list[float]]
