"""Tabulate default `generate` with SparseK, on a GPU and on a CPU: runs of `generate.py`."""

from collections.abc import Sequence

from speed_tables.cells import hundredths, joined_rows, prompt_of, quotient, short, table
from speed_tables.registry import Run, speed_table

GENERATE = ("generate-h200", "generate-8b-h200", "generate-smollm2-h200", "generate-smollm2-8k-h200")
BEFORE = "generate-before-h200"  # before steps were recorded
BOTH = ("dense", "sparse")


def rows_of(runs: Sequence[Run]) -> list[Run]:
    """Return the rows of several runs, each with the commit of its run; the first run that has a cell counts."""
    return joined_rows(runs, "shape", "prompt", "batch", keep=("commit",))


def speedups(rows: Sequence[Run], call: int | None = None) -> dict[str, float]:
    """Divide dense by sparse milliseconds of a step, by shape, prompt and batch: of one call, or the medians."""
    found = {}
    for row in rows:
        dense, sparse = (row[name]["step_ms"] if call is None else row[name]["steps_ms"][call] for name in BOTH)
        found[prompt_of(row)] = dense / sparse
    return found


@speed_table("generate", GENERATE, BEFORE)
def generate_table(runs: Sequence[Run], before: Run) -> str:
    measured = rows_of(runs)
    again, unseen, earlier = speedups(measured), speedups(measured, 0), speedups(before["rows"])
    rows = []
    for row in measured:
        cell = prompt_of(row)
        steps = [row[name]["steps_ms"][0] for name in BOTH] + [row[name]["step_ms"] for name in BOTH]
        whole = quotient(*(row[name].get("call_ms") for name in BOTH))
        times = map(hundredths, (unseen[cell], again[cell], whole, earlier.get(cell)))
        first = " / ".join(short(row[name]["first_token_ms"]) for name in BOTH)
        rows.append([cell, *map(short, steps), *times, first, row["commit"][:7]])
    head = ["shape, prompt x batch", "dense, unseen lengths", "sparse", "dense, lengths seen before", "sparse"]
    head += ["times as fast, unseen", "seen", "seen, whole call", "seen, before"]
    return table([*head, "first token, ms: dense / sparse", "commit"], rows)


@speed_table("launches", GENERATE, BEFORE)
def launches_table(runs: Sequence[Run], before: Run) -> str:
    """Tabulate the kernels that one decoding step launches; `before` is the run of an earlier commit."""
    earlier = {row["shape"]: row["profile"]["sparse"]["launches"] for row in before["rows"] if "profile" in row}
    rows = []
    for row in rows_of(runs):
        if "profile" in row:
            counts = [*(row["profile"][name]["launches"] for name in BOTH), earlier.get(row["shape"])]
            rows.append([row["shape"], *(f"{count:,}" if count else "-" for count in counts)])
    return table(["launches of a step", "dense", "sparse", "sparse, before"], rows)


@speed_table("generate summary", GENERATE)
def generate_summary(runs: Sequence[Run]) -> str:
    """Tabulate the smallest, median and largest ratio of all cells, for the README."""
    rows = []
    for label, call in (("lengths that the process has seen before", None), ("lengths it has not seen", 0)):
        found = sorted(speedups(rows_of(runs), call).values())
        numbers = (found[0], found[len(found) // 2], found[-1])
        rows.append([f"{label}, {len(found)} cells", *map(hundredths, numbers)])
    return table(["sparse, times as fast as dense", "least", "median", "most"], rows)


@speed_table("prefill calls", ("prefill-h200",))
@speed_table("entmax prefill calls", ("prefill-entmax-2a908df-h200", "prefill-entmax-h200"))
def prefill_call_table(runs: Sequence[Run]) -> str:
    """Tabulate runs of `prefill.py`: milliseconds and ratios of the calls, texts played, and kernels of a forward.

    A cell is that of the first run which has it; earlier runs played no forward.
    """
    rows = []
    every = joined_rows(runs, "shape", "prompt", keep=("commit",))
    shapes = list(dict.fromkeys(row["shape"] for row in every))
    for row in sorted(every, key=lambda row: (shapes.index(row["shape"]), row["prompt"])):
        cells = [f"{row['shape']}, {row['prompt']:,}"]
        for call in ("forward", "generate"):
            of_call = row[call]
            cells += [*(short(of_call[f"{name}_ms"]) for name in BOTH), f"{of_call['ratio']:.2f}"]
            cells.append(f"{of_call['played']} of {of_call['calls']}")
        cells += [hundredths(row.get(call, {}).get("ratio")) for call in ("uncached", "new", "new_uncached", "varied")]
        profile = [row["profile"][name] for name in BOTH]
        cells.append(" / ".join(short(one["kernels_ms"]) for one in profile))
        rows.append([*cells, " / ".join(f"{one['launches']:,}" for one in profile), row["commit"][:7]])
    calls = [f"{name}, {what}" for name in ("forward", "first token") for what in (*BOTH, "times as fast", "played")]
    calls += [
        f"{name}, times as fast"
        for name in ("forward without a cache", "new forward", "new without a cache", "first token, varied lengths")
    ]
    return table(["ms: shape, prompt", *calls, "kernels, dense / sparse", "launches, dense / sparse", "commit"], rows)


@speed_table("generate on a cpu", "generate-cpu", "generate-before-cpu")
def cpu_table(now: Run, before: Run) -> str:
    """Tabulate milliseconds of a step on a CPU, and ratios now and before."""
    earlier, again = speedups(before["rows"]), speedups(now["rows"])
    rows = []
    for row in now["rows"]:
        cell, steps = prompt_of(row), [short(row[name]["step_ms"]) for name in BOTH]
        rows.append([cell, *steps, hundredths(again[cell]), hundredths(earlier.get(cell))])
    return table(["shape, prompt x batch", "dense, ms", "sparse, ms", "times as fast", "before"], rows)
