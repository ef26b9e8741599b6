"""Register the functions that make tables with the JSON that they need, and put the tables into documents."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parents[1] / "results"
Run = dict[str, Any]  # what a benchmark wrote
Source = str | tuple[Any, ...]  # the name of a JSON file without its suffix, or several sources
_NAME = "[a-z0-9 ]+"
MakeT = TypeVar("MakeT", bound=Callable[..., str])
_TABLES: dict[str, tuple[Callable[..., str], tuple[Source, ...], dict[str, Any]]] = {}


def speed_table(name: str, *sources: Source, **options: Any) -> Callable[[MakeT], MakeT]:
    """Register a function as what makes a table.

    Args:
        name: of the table in documents: lower case letters, digits and spaces.
        sources: what the function gets first: a run for the name of a file, a list for a tuple.
        options: further arguments of the function.

    Raises:
        ValueError: another table has the name, or no mark in a document can have it.
    """
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"a table is called by lower case letters, digits and spaces, got {name!r}")
    if name in _TABLES:
        raise ValueError(f"two tables are called {name!r}")

    def register(make: MakeT) -> MakeT:
        _TABLES[name] = make, sources, options
        return make

    return register


def reader(folder: Path) -> Callable[[Source], Any]:
    """Return a function that reads a source from a folder of results, each file once."""

    @cache
    def read(source: Source) -> Any:
        if isinstance(source, tuple):
            return [read(part) for part in source]
        return json.loads((folder / f"{source}.json").read_text("utf-8"))

    return read


def all_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Make every table from the results in a folder, by name."""
    read = reader(folder)
    return {name: make(*map(read, sources), **options) for name, (make, sources, options) in _TABLES.items()}


def fill(text: str, tables: dict[str, str]) -> str:
    """Return a document with the marked tables replaced; a name that `tables` does not hold is a KeyError.

    Marks with names in any other form, such as those of `benchmarks/learning`, are left alone."""
    place = re.compile(rf"(<!-- table: ({_NAME}) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}{tables[found[2]]}{found[3]}", text)
