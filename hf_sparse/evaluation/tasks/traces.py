"""Make tasks of long generation: short prompts from which many lines follow, each of them exactly one right line.

The prompt says which operations are repeated, and the lines carry them out. What is needed for a line stands in the
prompt and in the line before, or (in a program) in a line that may be hundreds of tokens back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from random import Random

_OPERATIONS = 10  # of an arithmetic chain, half of them with a plus
_NAMES = "abcdef"  # variables of a program
_STATEMENTS = 16  # lines of a program; some variables stand in one line only


@dataclass(frozen=True)
class Derivation:
    """Hold a prompt, and the lines that follow from it without end; each without its line break."""

    prompt: str
    lines: Iterator[str]


@dataclass(frozen=True)
class TraceTask:
    """Describe a kind of derivations that are made from a seed; the metric is the share of lines that are right."""

    name: str
    make: Callable[[Random], Derivation]


def arithmetic(random: Random) -> Derivation:
    """Add and subtract the same numbers in turn, again and again."""
    amounts = random.sample(range(11, 60), _OPERATIONS // 2)
    operations = [(sign, amount) for sign in "+-" for amount in amounts]  # their sum is 0, so that numbers stay small
    random.shuffle(operations)
    start = random.randint(400, 600)

    def lines() -> Iterator[str]:
        value = start
        for sign, amount in cycle(operations):
            before, value = value, value + amount if sign == "+" else value - amount
            yield f"{before} {sign} {amount} = {value}"

    told = ", ".join(f"{sign} {amount}" for sign, amount in operations)
    return Derivation(
        f"Start with {start}. Do these operations one after another, and begin again with the first after the last: "
        f"{told}. Write every operation as a line with the number before it and the number after it.\n\n",
        lines(),
    )


def program(random: Random) -> Derivation:
    """Run a program in a loop, whose variables change at different rates, and print what each line does."""
    names = [*_NAMES, *random.choices(_NAMES[: len(_NAMES) // 2], k=_STATEMENTS - len(_NAMES))]
    random.shuffle(names)
    statements = list(zip(names, random.sample(range(11, 60), _STATEMENTS), strict=True))
    start = {name: random.randint(300, 700) for name in _NAMES}

    def lines() -> Iterator[str]:
        values = dict(start)
        for number, (name, amount) in cycle(enumerate(statements, 1)):
            before = values[name]
            values[name] += amount
            yield f"line {number}: {name} = {before} + {amount} = {values[name]}"

    told = "\n".join(
        f"line {number}: {name} = {name} + {amount}" for number, (name, amount) in enumerate(statements, 1)
    )
    values = ", ".join(f"{name} = {value}" for name, value in start.items())
    return Derivation(
        f"A program has {_STATEMENTS} lines, and begins again with the first after the last:\n\n{told}\n\nAt the start "
        f"{values}. Every line prints its number, the name of its variable, and the values before and after. The "
        "program prints:\n\n",
        lines(),
    )


#: Every task of long generation by name.
TRACES = {task.name: task for task in (TraceTask("arithmetic", arithmetic), TraceTask("program", program))}
