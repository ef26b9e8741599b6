"""The lines of a sweep as Markdown tables, one per model, in their places of a document."""

import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from settings import SETTINGS

_ABOUT = {"dense": "all keys", "recency": "no scorer: a wider window", "shares": "slots divided among the layers"}


def write_table(lines: list[dict[str, Any]], document: Path) -> None:
    """Replace what is between `<!-- table: MODEL -->` and `<!-- end -->`; a document without the place is refused."""
    text = document.read_text()
    models: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        models[line["model"]].append(line)
    for model, some in models.items():
        place = re.compile(rf"(<!-- table: {re.escape(model)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            sys.exit(f"{document} has no place for the table of {model}: <!-- table: {model} --> ... <!-- end -->")
        new = table(some)
        text = place.sub(lambda found, new=new: f"{found[1]}{new}{found[2]}", text)
    document.write_text(text)


def table(lines: list[dict[str, Any]]) -> str:
    """One row per setting, the best perplexity at the smallest budget first; several seeds as mean and half range."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        runs[line["name"]].append(line)
    slots = list(lines[0]["quality"])
    header = ["setting", "what", *(f"perplexity, {n} slots" for n in slots), *(f"KL, {n} slots" for n in slots)]
    header += ["parameters", "training, s", "seeds"]
    rows = []
    for name, some in sorted(runs.items(), key=lambda item: mean(_values(item[1], slots[0], "perplexity"))):
        cells = [f"`{name}`", ", ".join(_about(part) for part in name.split("+"))]
        cells += [_spread(_values(some, n, "perplexity"), 3) for n in slots]
        cells += [_spread(_values(some, n, "divergence"), 4) for n in slots]
        trained = [line for line in some if "seconds" in line]
        cells += (
            [f"{trained[0]['parameters']:,}", f"{mean(t['seconds'] for t in trained):.0f}"] if trained else ["", ""]
        )
        cells.append(str(len(some)) if trained else "")
        rows.append(cells)
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def _about(name: str) -> str:
    return SETTINGS[name].about if name in SETTINGS else _ABOUT[name]


def _values(lines: list[dict[str, Any]], slots: str, key: str) -> list[float]:
    return [line["quality"][slots][key] for line in lines]


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
