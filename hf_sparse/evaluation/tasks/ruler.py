"""Generate tasks of tracing and aggregation after RULER (Hsieh et al. 2024, 2404.06654), with prompts of our own."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from string import ascii_lowercase, ascii_uppercase

from hf_sparse.evaluation.tasks.base import Draft, Task
from hf_sparse.evaluation.tasks.haystack import Haystack, hide
from hf_sparse.evaluation.tasks.needles import number
from hf_sparse.evaluation.tasks.scores import recall
from hf_sparse.evaluation.tasks.words import LISTED

_HOPS = 4
_COMMON = 5  # words that are asked for
_COMMON_SHARE = 0.5  # share of the list that common words fill
_CODED = 3  # coded words that are asked for


def variable_tracking(random: Random, haystack: Haystack, depths: Sequence[float]) -> Draft:
    """Ask for every variable that has a value, which each hands to the next."""
    names: list[str] = []
    while len(names) < _HOPS + 1:
        if (name := "".join(random.choices(ascii_uppercase, k=3))) not in names:
            names.append(name)
    value, filler = number(random), haystack.draw(random)
    told = [f"VAR {names[0]} = {value}."]
    told += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    places = sorted(random.random() for _ in names)

    def render(count: int) -> str:
        text = hide(filler(count), list(zip(places, told, strict=True)))
        return (
            f"Follow the variables that are assigned in the text.\n\n{text}\n\n"
            f"Which {len(names)} variables have the value {value}? The variables with the value {value} are"
        )

    return Draft(render, tuple(names))


def common_words(random: Random, haystack: Haystack, depths: Sequence[float]) -> Draft:
    """List words; asked for: the few that fill half of it."""
    words = random.sample(LISTED, len(LISTED))
    common, others, seed = words[:_COMMON], words[_COMMON:], random.random()

    def render(count: int) -> str:
        often = round(count * _COMMON_SHARE)
        listed = [common[i % len(common)] for i in range(often)]
        listed += [others[i % len(others)] for i in range(count - often)]
        Random(seed).shuffle(listed)
        return (
            f"Below is a list of words. Some appear more often than others.\n\n{' '.join(listed)}\n\n"
            f"What are the {_COMMON} most common words in the list? The {_COMMON} most common words are"
        )

    return Draft(render, tuple(common))


def frequent_words(random: Random, haystack: Haystack, depths: Sequence[float]) -> Draft:
    """List coded words, the `i`-th with a frequency in proportion to `1 / i**2`; asked for: the first three."""
    coded = ["".join(random.choices(ascii_lowercase, k=5)) for _ in range(50)]
    shares = [1 / (rank + 1) ** 2 for rank in range(len(coded))]
    seed = random.random()

    def render(count: int) -> str:
        listed = [
            word for word, share in zip(coded, shares, strict=True) for _ in range(int(count * share / sum(shares)))
        ]
        rare = coded[len(coded) // 2 :]
        listed += [rare[i % len(rare)] for i in range(count - len(listed))]  # places that rounding left over
        Random(seed).shuffle(listed)
        return (
            f"Read the coded text and count its words.\n\n{' '.join(listed)}\n\n"
            f"What are the {_CODED} most frequent words in the coded text? The {_CODED} most frequent words are"
        )

    return Draft(render, tuple(coded[:_CODED]))


TASKS = (
    Task("variable_tracking", "recall", "none", variable_tracking, recall),
    Task("common_words", "recall", "none", common_words, recall),
    Task("frequent_words", "recall", "none", frequent_words, recall),
)
