"""Choose what runs: by default a part of the large crosses, with `--values` less, with `--full` every test.

Two markers say what is left out without `--full`:

- `full`: the test. A cheaper one beside it checks the same promise by default.
- `cross`: of a test with several parameters, combinations until every pair of values has been together once;
  `cross("values")` stops as soon as every value has been there. A parameter is one `parametrize` (or one fixture with
  `params`), of one name or several.

With `--values` all tests with several parameters are taken as `cross("values")` ones, and the `cross("values")` tests
of one file with the same names of parameters share their values: every test runs, and every value of every parameter is
in one of them. `make test` runs those marked `versions` so on the oldest versions, after the newest have had all that
runs by default.

The choices depend on nothing but the names of tests and parameters, so every process chooses the same tests.
"""

import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

Row = tuple[Hashable, ...]
STRENGTHS = {"values": 1, "pairs": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every test and every combination of parameters")
    parser.addoption("--values", action="store_true", help="run no more combinations than have every value once")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what is left to `--full`."""
    if config.getoption("full"):
        return
    values_only = config.getoption("values")
    crosses: dict[tuple[Path, str], list[pytest.Item]] = {}
    chosen: set[pytest.Item] = set()
    for item in items:
        if item.get_closest_marker("full"):
            continue
        marker = item.get_closest_marker("cross")
        if values_only and marker and marker.args == ("values",) and hasattr(item, "callspec"):
            crosses.setdefault((item.path, " ".join(sorted(item.callspec.params))), []).append(item)
        elif marker or (values_only and hasattr(item, "callspec")):
            crosses.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
        else:
            chosen.add(item)
    for cross in crosses.values():
        chosen.update(_chosen(cross, values_only))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _chosen(cross: list[Any], values_only: bool) -> list[pytest.Item]:
    """Return the combinations that cover every value and every test, or the pairs that the nearest marker asks for."""
    marker = cross[0].get_closest_marker("cross")
    strength = STRENGTHS["values" if values_only else marker.args[0] if marker.args else "pairs"]
    # One id for each `parametrize`, however many names it has.
    rows = [(item.nodeid.partition("[")[0], *item.callspec._idlist) for item in cross]
    # Tests begin at different places, so that values which are together in one are apart in another.
    first = zlib.crc32(cross[0].originalname.encode()) % len(rows)
    return [cross[(first + i) % len(rows)] for i in covering(rows[first:] + rows[:first], strength)]


def covering(rows: Sequence[Row], strength: int = 2) -> list[int]:
    """Return the indices, in order, of few rows that hold every combination of `strength` values of the rows.

    Greedy: the next row is the first of those with the most new combinations; of equally many, those with the most new
    combinations of one value more, and then those whose values were taken least often. Combinations that are in no row
    are not asked for.
    """

    def combinations_of(row: Row, size: int) -> set[Row]:
        return set(combinations(enumerate(row), min(size, len(row))))

    missing = {i: combinations_of(row, strength) for i, row in enumerate(rows)}
    beyond = {i: combinations_of(row, strength + 1) for i, row in enumerate(rows)}
    taken: list[int] = []
    used: Counter[Hashable] = Counter()
    while any(missing.values()):
        best = max(missing, key=lambda i: (len(missing[i]), len(beyond[i]), -sum(used[v] for v in enumerate(rows[i]))))
        taken.append(best)
        used.update(enumerate(rows[best]))
        new, newer = missing.pop(best), beyond.pop(best)
        for i in missing:
            missing[i] -= new
            beyond[i] -= newer
    return sorted(taken)
