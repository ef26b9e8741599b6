"""Write tables in Markdown and the cells that many of them have, and join the rows of several runs."""

from collections.abc import Iterable, Sequence
from typing import Any

from speed_tables.registry import Run

PASSES = {"forward": "Forward", "forward_backward": "Forward and backward"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns after the first are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def short(value: float | None) -> str:
    """Write a number with three digits, and a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}"


def quotient(one: float | None, other: float | None) -> float | None:
    """Divide two measured numbers; `None` where one of them is missing."""
    return one / other if one and other else None


def hundredths(value: float | None) -> str:
    """Write a number with two decimals, and a dash for None."""
    return "-" if value is None else f"{value:.2f}"


def ratio(one: float | None, other: float | None) -> str:
    """Write the quotient of two measured numbers with two decimals, and a dash where one of them is missing."""
    return hundredths(quotient(one, other))


def gibibytes(number: int, decimals: int) -> str:
    """Write a number of bytes in GiB."""
    return f"{number / 2**30:.{decimals}f} GiB"


def thousands(lengths: Iterable[int]) -> list[str]:
    """Write numbers of tokens as titles of columns."""
    return [f"{length:,}" for length in lengths]


def prompt_of(row: Run) -> str:
    """Write the shape, tokens and batch of a prompt."""
    return f"{row['shape']}, {row['prompt']:,} x {row['batch']}"


def heads_of(settings: Run) -> str:
    """Write query heads, KV heads and their size."""
    return f"{settings['query_heads']} / {settings['kv_heads']} x {settings['dim']}"


def joined_rows(runs: Iterable[Run], *names: str, keep: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of several runs of a benchmark: of those that agree in the columns `names` the first.

    Each row gets what its run has under the names `keep`."""
    found: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault(tuple(row.get(name) for name in names), row | {name: run[name] for name in keep})
    return list(found.values())


def check_settings(runs: Sequence[Run], script: str, *but: str) -> None:
    """Refuse to join runs whose settings differ in another name than `but`."""
    settings = [{name: value for name, value in run["settings"].items() if name not in but} for run in runs]
    if any(one != settings[0] for one in settings):
        raise ValueError(f"the runs of {script} have different settings")
