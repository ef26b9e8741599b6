"""Hide facts in chunks of a text and ask for them further on, so that training shows what a question needs later.

A sparse model that is distilled on such chunks is told by the dense one what stands in an answer; there are no labels.
Facts are numbers, codes and places of invented names, lists of keys with values, and names that are handed a value one
from the other. Their wordings and names are others than those of `hf_sparse.evaluation.tasks`.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from hf_sparse.errors import DataError

_LEAST, _MOST = 0.05, 0.4  # share of a chunk that facts and questions fill, at most
# Tokens of a chunk that tell facts, at most. Where they are more than slots, a model learns to keep the latest of them.
_FEW, _MANY = 32, 256
_ATTEMPTS = 20  # facts that may be too long for a chunk, one after another
_AGAIN = 0.25  # share of facts that are asked for twice

_CONSONANTS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gl",
    "kr",
    "pl",
    "st",
    "tr",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]

#: What is told, and the question with its answer.
_PAIRS = (
    ("The code for {key} is {value}.", "Which code is for {key}? The code for {key} is {value}."),
    ("Note: {key} = {value}.", "As noted before, {key} = {value}."),
    ("{key} was filed under {value}.", "Question: what was {key} filed under? Answer: {value}."),
    ("You can reach {key} at {value}.", "Who wants to reach {key} should try {value}."),
    ("{key} arrived from {value}.", "Where did {key} arrive from? From {value}."),
    ("The box of {key} holds {value}, and nothing else.", "When the box of {key} was opened, it held {value}."),
    ("Do not forget {value}: it opens the door of {key}.", "The door of {key} is opened by {value}."),
    ("({key} is written as {value}.)", "Here {key} has to be written again: {value}."),
)


@dataclass(frozen=True)
class Fact:
    """Hold what is told in a text, in this order, and the questions with their answers that come after all of it."""

    told: tuple[str, ...]
    asked: tuple[str, ...]


def hide_facts(tokenizer: Any, chunks: Tensor, share: float, *, seed: int = 0) -> Tensor:
    """Return chunks of which a share have facts and questions between their sentences; they lose their ends for these.

    What is told takes at most 32 to 256 tokens of such a chunk, so that few slots can keep all of it, and what is told
    and asked at most 5 to 40 %. Where facts stand and how far on they are asked for is random.

    Args:
        tokenizer: the one that made the chunks.
        chunks: `[N, T]` int64 for a causal language model, see `hf_sparse.data.pack`.
        share: of the chunks, in `[0, 1]`; of more than 0 at least one chunk.
        seed: seed of the facts; another one hides others in other chunks.

    Returns:
        `[N, T]` int64; the first token of every chunk is what it was.

    Raises:
        DataError: chunks too short for a fact.
        ValueError: the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"retrieval must be a share of the chunks from 0 to 1, got {share}")
    count = max(1, round(share * len(chunks))) if share else 0
    ends = _sentence_ends(tokenizer, chunks) if count else set()
    result = chunks.clone()
    for row in Random(f"{seed} rows").sample(range(len(chunks)), count):
        tokens = _with_facts(tokenizer, chunks[row].tolist(), ends, Random(f"{seed} {row}"))
        result[row] = torch.tensor(tokens, dtype=chunks.dtype)
    return result


def _with_facts(tokenizer: Any, chunk: list[int], ends: set[int], random: Random) -> list[int]:
    """Return a chunk with facts and questions put between its sentences, and as many tokens as before."""
    room, most = random.uniform(_LEAST, _MOST) * len(chunk), _MOST * len(chunk)
    enough = random.uniform(_FEW, _MANY)
    pieces: list[tuple[float, list[int]]] = []  # where a piece belongs, as a share of the text, and its tokens
    filled = told = failed = 0
    while filled < room and told < enough and failed < _ATTEMPTS:
        fact = random.choice(KINDS)(random)
        texts = [random.choice((" ", "\n")) + text for text in (*fact.told, *fact.asked)]
        tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        sizes = [len(piece) for piece in tokens]
        new = sum(sizes[: len(fact.told)])
        if filled + sum(sizes) > most or told + new > _MANY:
            failed += 1
            continue
        pieces += zip(sorted(random.random() for _ in tokens), tokens, strict=True)
        filled, told = filled + sum(sizes), told + new
    if not pieces:
        raise DataError(f"chunks of {len(chunk)} tokens are too short for facts and questions: use longer chunks")
    text = chunk[: len(chunk) - filled]
    gaps = [place for place, token in enumerate(text, 1) if token in ends] or list(range(1, len(text) + 1))
    result: list[int] = []
    begin = 0
    for place, tokens_of_piece in sorted(pieces, key=lambda piece: piece[0]):
        end = gaps[min(bisect_left(gaps, place * len(text)), len(gaps) - 1)]
        result += text[begin:end] + tokens_of_piece
        begin = end
    return result + text[begin:]


def _sentence_ends(tokenizer: Any, chunks: Tensor) -> set[int]:
    """Return the tokens of chunks after which a sentence or a line is over."""
    used = chunks.unique().tolist()
    texts = [tokenizer.decode([token]) for token in used]
    return {token for token, text in zip(used, texts, strict=True) if text.rstrip(" ").endswith((".", "!", "?", "\n"))}


def _pair(random: Random) -> Fact:
    """Tell the value of one name, and ask for it once or twice."""
    told, asked = random.choice(_PAIRS)
    names = {"key": random.choice((_word, _full_name, _numbered))(random), "value": _value(random)}
    return Fact((told.format(**names),), (asked.format(**names),) * (1 + (random.random() < _AGAIN)))


def _list(random: Random) -> Fact:
    """Tell a list of keys with values, a line each, and ask for two of them."""
    of_keys, of_values = random.choice((_word, _numbered)), random.choice((_digits, _mixed, _word))
    lines = {of_keys(random): of_values(random) for _ in range(random.randint(3, 8))}
    mark = random.choice((":", " ->", ","))
    told = "".join(f"\n{key}{mark} {value}" for key, value in lines.items()) + "\n"
    asked = random.sample(list(lines), 2)
    return Fact((told,), tuple(f"\nIn the list above: {key}{mark} {lines[key]}\n" for key in asked))


def _chain(random: Random) -> Fact:
    """Give a value from name to name, and ask for the value of one name and for all names."""
    names, value = [_word(random) for _ in range(random.randint(3, 5))], _value(random)
    told = [f"Let {names[0]} be {value}.", *(f"Let {new} be what {old} is." for old, new in pairwise(names))]
    asked = (f"What is {random.choice(names)}? It is {value}.", f"All that is {value}: {', '.join(names)}.")
    return Fact(tuple(told), asked)


#: The kinds of facts, of which one is drawn at a time.
KINDS: Sequence[Callable[[Random], Fact]] = (_pair, _pair, _pair, _list, _chain)


def _value(random: Random) -> str:
    return random.choice((_digits, _digits, _mixed, _word, _full_name))(random)


def _word(random: Random) -> str:
    """Make up a word."""
    syllables = random.randint(2, 3)
    word = "".join(random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(syllables))
    return (word + random.choice(("", "n", "r", "l"))).capitalize()


def _full_name(random: Random) -> str:
    return f"{_word(random)} {_word(random)}"


def _numbered(random: Random) -> str:
    return f"{random.choice(('room', 'item', 'order', 'box'))} {random.randint(2, 999)}"


def _digits(random: Random) -> str:
    return "".join(random.choices("0123456789", k=random.randint(3, 8)))


def _mixed(random: Random) -> str:
    """Make a code of letters and digits."""
    return "-".join("".join(random.choices("abcdefhkmnprtuvwxy2345678", k=4)) for _ in range(random.randint(1, 2)))
