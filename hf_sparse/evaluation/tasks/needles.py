"""Make tasks of retrieval: facts in a long text, and a question about them at its end."""

from collections.abc import Sequence
from random import Random

from hf_sparse.evaluation.tasks.base import Draft, Task
from hf_sparse.evaluation.tasks.haystack import Haystack, hide
from hf_sparse.evaluation.tasks.scores import first_word, recall
from hf_sparse.evaluation.tasks.words import KEYS

_DISTRACTORS = 7


def number(random: Random) -> str:
    return str(random.randrange(10_000, 100_000))


def passkey(random: Random, haystack: Haystack, depths: Sequence[float]) -> Draft:
    """Hide one number, told twice in a row (Mohtashami and Jaggi 2023, 2305.16300)."""
    key, filler = number(random), haystack.draw(random)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def render(count: int) -> str:
        text = hide(filler(count), [(depths[0], needle)])
        return (
            "There is important information hidden in the text. Find it and remember it.\n\n"
            f"{text}\n\nWhat is the pass key? The pass key is"
        )

    return Draft(render, (key,))


def needles(random: Random, haystack: Haystack, depths: Sequence[float]) -> Draft:
    """Hide as many numbers of one key as there are depths, all of them asked for (RULER's multi-value retrieval)."""
    key, filler = random.choice(KEYS), haystack.draw(random)
    values = [str(value) for value in random.sample(range(10_000, 100_000), len(depths))]
    told = [f"One of the magic numbers of {key} is {value}." for value in values]

    def render(count: int) -> str:
        text = hide(filler(count), list(zip(depths, told, strict=True)))
        return (
            f"Some magic numbers of {key} are hidden in the text. Remember them all.\n\n{text}\n\n"
            f"What are all the magic numbers of {key} in the text? The magic numbers of {key} are"
        )

    return Draft(render, tuple(values))


def _keyed(random: Random, haystack: Haystack, count: int) -> Draft:
    """Hide `count` keys with a number each, one of them asked for."""
    keys, filler = random.sample(KEYS, count), haystack.draw(random)
    values = [number(random) for _ in keys]
    told = [f"The magic number of {key} is {value}." for key, value in zip(keys, values, strict=True)]
    places = [random.random() for _ in keys]

    def render(units: int) -> str:
        text = hide(filler(units), list(zip(places, told, strict=True)))
        return (
            f"A magic number is hidden in the text. Remember it.\n\n{text}\n\n"
            f"What is the magic number of {keys[0]}? The magic number of {keys[0]} is"
        )

    return Draft(render, (values[0],))


def single_key(random: Random, haystack: Haystack, depths: Sequence[float]) -> Draft:
    """Hide one key and its number anywhere."""
    return _keyed(random, haystack, 1)


def multi_key(random: Random, haystack: Haystack, depths: Sequence[float]) -> Draft:
    """Hide one key among seven other keys with numbers of their own."""
    return _keyed(random, haystack, 1 + _DISTRACTORS)


TASKS = (
    Task("passkey", "exact match", "each", passkey, first_word),
    Task("needles", "recall", "all", needles, recall),
    Task("single_key", "exact match", "none", single_key, first_word),
    Task("multi_key", "exact match", "none", multi_key, first_word),
)
