"""Make filler text of any length, hide needles in it, and fit prompts to a number of tokens."""

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from hf_sparse.data import prompt_tokens
from hf_sparse.errors import DataError
from hf_sparse.evaluation.tasks.words import ADJECTIVES, NOUNS, PLACES, VERBS

Sentences = Callable[[int], list[str]]


class Haystack:
    """Draw sentences without end, of a text or made up.

    Args:
        text: taken sentence by sentence from a random place on, and around again at its end; by default sentences are
            generated, in which no number and no rare word ever stands.
        name: name of the text in a result.

    Raises:
        DataError: a text without a sentence.
    """

    def __init__(self, text: str | None = None, name: str = "") -> None:
        self.name = name or ("generated" if text is None else "text")
        self._sentences = None if text is None else re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        if self._sentences == [""]:
            raise DataError("the haystack holds no text")

    def draw(self, random: Random) -> Sentences:
        """Return a function to the first `n` sentences of one haystack; fewer are a prefix of more."""
        drawn: list[str] = []
        start = None if self._sentences is None else random.randrange(len(self._sentences))
        # The caller's next random numbers must not depend on the number of sentences.
        filler = Random(random.random())

        def first(count: int) -> list[str]:
            while len(drawn) < count:
                if self._sentences is None or start is None:
                    drawn.append(_sentence(filler))
                else:
                    drawn.append(self._sentences[(start + len(drawn)) % len(self._sentences)])
            return drawn[:count]

        return first


def hide(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """Return sentences with needles between them, each after a share of the sentences; in order where shares are equal.

    >>> hide(["A.", "B."], [(0.5, "x"), (0, "y")])
    'y A. x B.'
    """
    mixed = list(sentences)
    for depth, needle in reversed(sorted(needles, key=lambda pair: pair[0])):
        mixed.insert(round(depth * len(sentences)), needle)
    return " ".join(mixed)


def fit(tokenizer: Any, render: Callable[[int], str], limit: int) -> list[int]:
    """Return the tokens of the longest prompt of at most `limit` tokens, special ones included.

    Raises:
        DataError: even the prompt without filler is longer.
    """

    def tokens(units: int) -> list[int]:
        return prompt_tokens(tokenizer, render(units))

    best = tokens(0)
    if len(best) > limit:
        raise DataError(f"expected a prompt of at most {limit} tokens, got {len(best)} without any filler")
    low, high = 0, 1
    while len(longer := tokens(high)) <= limit:
        low, high, best = high, 2 * high, longer
    while high - low > 1:
        middle = (low + high) // 2
        if len(shorter := tokens(middle)) <= limit:
            low, best = middle, shorter
        else:
            high = middle
    return best


def _sentence(random: Random) -> str:
    subject, thing = random.sample(NOUNS, 2)
    first, second = random.sample(ADJECTIVES, 2)
    return f"The {first} {subject} {random.choice(VERBS)} the {second} {thing} {random.choice(PLACES)}."
