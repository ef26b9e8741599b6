"""Tabulate where the time goes: kernels of a call, sizes of programs, and first calls."""

from collections.abc import Sequence

from speed_tables.cells import joined_rows, ratio, short, table
from speed_tables.registry import Run, speed_table
from speed_tables.whole_models import CACHES


@speed_table("profiles", ("profiles-recorded-h200", "profiles-launches-h200", "profiles-scores-h200", "profiles-h200"))
def profile_table(runs: Sequence[Run]) -> str:
    """Tabulate calls, the time of their kernels and the longest kernels; of equal calls the first one counts."""
    parts = ("attention", "training", "decoding")
    rows = []
    calls = joined_rows(runs, "part", "length", "variant", "batch")
    for row in sorted(calls, key=lambda row: parts.index(row["part"])):
        longest = [
            f"{kernel['name'].split('<')[0].split('(')[0][:40]} {short(kernel['ms'])}" for kernel in row["kernels"][:5]
        ]
        size = f"{row['length']:,}" + (f" x {row['batch']}" if "batch" in row else "")
        count = f"{row['launches']:,}" if row["launches"] else "-"
        part = f"{row['part']}, {CACHES[row['variant']]}" if "variant" in row else row["part"]
        rows.append([part, size, short(row["call_ms"]), short(row["kernels_ms"]), count, ", ".join(longest)])
    head = ["call", "tokens", "ms", "ms of kernels", "launches", "longest kernels, ms"]
    return table(head, rows)


@speed_table("sizes", ("sizes-h200", "sizes-more-h200", "sizes-soft-h200"))
def sizes_table(runs: Sequence[Run]) -> str:
    """Tabulate the sizes in use for every shape and kernel, and the fastest ones of the search, of the first run."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        of_run: dict[tuple, list[Run]] = {}
        for row in run["rows"]:
            of_run.setdefault(tuple(row[name] for name in ("gates", "shape", "kernel", "length")), []).append(row)
        groups = of_run | groups

    def written(row: Run) -> list[str]:
        numbers = (str(row[name] or "any") for name in ("rows", "keys", "warps", "stages", "registers"))
        return [" x ".join(numbers), short(row["median_ms"])]

    rows = []
    for (gates, shape, kernel, length), found in sorted(groups.items()):
        used = next(row for row in found if row["in_use"])
        best = min(found, key=lambda row: row["median_ms"])
        cells = [*written(used), *written(best), ratio(used["median_ms"], best["median_ms"])]
        rows.append([shape, gates, kernel, f"{length:,}", *cells])
    return table(["heads x size", "gates", "kernel", "tokens", "in use", "ms", "fastest", "ms", "ratio"], rows)


@speed_table("first calls", "first_calls-h200")
def first_call_table(first_calls: Run) -> str:
    """Tabulate the seconds of the first length, and the longest first call of another length."""
    rows = []
    for row in first_calls["rows"]:
        first, *others = row["calls"].values()
        later = [seconds for call in others for name, seconds in call.items() if name != "again_s"]
        both = first.get("forward_backward_s")
        cells = (first["forward_s"], both, both and first["forward_s"] + both, max(later, default=None))
        rows.append([row["family"], str(row["cores"]), *map(short, cells)])
    head = ["family, seconds", "cores", "first forward", "first with backward after it", "both", "another length"]
    return table(head, rows)
