"""Score generated text, each score in `[0, 1]`."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def first_word(text: str, answers: Sequence[str]) -> list[float]:
    """Score the exact match of the first word or number with the one answer.

    >>> first_word(" 12345. The sky", ["12345"]), first_word(" 123456", ["12345"])
    ([1.0], [0.0])
    """
    return [float(_words(text)[:1] == _words(answers[0]))]


def recall(text: str, answers: Sequence[str]) -> list[float]:
    """Score whether each answer stands in the text as a whole word, as RULER scores (Hsieh et al. 2024, 2404.06654).

    >>> recall(" apple, Pear and plum", ["pear", "fig", "plum"])
    [1.0, 0.0, 1.0]
    """
    said = set(_words(text))
    return [float(answer.lower() in said) for answer in answers]


def f1(text: str, answers: Sequence[str]) -> float:
    """Score the F1 of the words in common with the best of several answers, as LongBench does for English questions.

    >>> f1("The red house", ["a red car", "none"])
    0.5
    """
    return max(_f1(_normalised(text).split(), _normalised(answer).split()) for answer in answers)


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Score whether the whole text is one of the answers, normalised as for SQuAD.

    >>> exact_match("The Red House.", ["red house"])
    1.0
    """
    return float(_normalised(text) in {_normalised(answer) for answer in answers})


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _normalised(text: str) -> str:
    """Return lower case without punctuation, articles and extra spaces (Rajpurkar et al. 2016, 1606.05250)."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _f1(said: list[str], expected: list[str]) -> float:
    common = sum((Counter(said) & Counter(expected)).values())
    return 2 * common / (len(said) + len(expected)) if common else 0.0
