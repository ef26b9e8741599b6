"""Tabulate whole models with SparseK in the shape of Llama 8B: runs of `model.py`."""

from collections.abc import Sequence
from typing import Any

from speed_tables.cells import check_settings, gibibytes, joined_rows, ratio, short, table
from speed_tables.registry import Run, speed_table

MODELS = tuple(f"model{run}-h200" for run in ("-prefill", "-def4bf7", "-d781133", "-scores", "", "-eager", "-earlier"))
CACHES = {
    "dynamic": "dense, dynamic cache",
    "static": "dense, static cache, compiled",
    "sparse eager": "sparse, eager",
    "sparse": "sparse, compiled",
}


def rows_of(runs: Sequence[Run], part: str) -> list[dict[str, Any]]:
    """Return the rows of one part, each with the bandwidth of its run; the first run that has a cell counts."""
    check_settings(runs, "model.py")
    rows = joined_rows(runs, "part", "variant", "context", "batch", keep=("bandwidth",))
    return [row for row in rows if row["part"] == part]


def decoding_cells(runs: Sequence[Run]) -> dict[tuple[str, int, int], dict[str, Any]]:
    return {(row["variant"], row["context"], row["batch"]): row for row in rows_of(runs, "decode")}


@speed_table("decoding", MODELS)
def decode_table(runs: Sequence[Run]) -> str:
    cells = decoding_cells(runs)
    rows = []
    for context, batch in sorted({key[1:] for key in cells}):
        row = [f"{context:,} x {batch}"]
        for variant in CACHES:
            cell = cells.get((variant, context, batch))
            if cell is None or "step_ms" not in cell:
                row.append("does not fit" if cell and "skipped" in cell else "-")
                continue
            share = 1e3 * cell["bytes_per_step"] / cell["bandwidth"] / cell["step_ms"]["median_ms"]
            row.append(f"{cell['tokens_per_second']:,.0f} ({share:.0%}, {gibibytes(cell['kv_bytes'], 2)})")
        ours, *theirs = (
            cells.get((variant, context, batch), {}).get("tokens_per_second")
            for variant in ("sparse", "dynamic", "static")
        )
        rows.append([*row, *(ratio(ours, one) for one in theirs)])
    head = ["context x batch", *CACHES.values(), "compiled sparse / dynamic", "compiled sparse / static"]
    return table(head, rows)


@speed_table("spread", MODELS)
def spread_table(runs: Sequence[Run]) -> str:
    """Tabulate the largest relative difference of a step between two runs, by variant."""
    steps: dict[str, dict[tuple[int, int], list[float]]] = {name: {} for name in CACHES}
    for row in (row for run in runs for row in run["rows"] if "step_ms" in row):
        cells = steps[row["variant"]].setdefault((row["context"], row["batch"]), [])
        cells.append(row["step_ms"]["median_ms"])
    rows = [
        [label, f"{max(max(times) / min(times) - 1 for times in steps[name].values()):.0%}"]
        for name, label in CACHES.items()
    ]
    return table(["decoding step", "largest difference between two runs"], rows)


@speed_table("prefill", MODELS, part="prefill", names={"dense": "dense (SDPA)", "sparse": "sparse"})
@speed_table(
    "training", MODELS, part="train", names={"scorers": "training step", "dense teacher": "dense teacher, of it"}
)
def long_table(runs: Sequence[Run], part: str, names: dict[str, str]) -> str:
    """Tabulate milliseconds, speed and memory of whole texts."""
    cells = {(row["variant"], row["context"]): row for row in rows_of(runs, part) if "median_ms" in row}
    rows = []
    for context in sorted({key[1] for key in cells}):
        row = [f"{context:,}"]
        for variant in names:
            cell = cells.get((variant, context))
            if cell is None:
                row.append("-")
                continue
            peak = f", {gibibytes(cell['peak_bytes'], 1)}" if "peak_bytes" in cell else ""
            row.append(f"{short(cell['median_ms'])} ms, {1e3 * context / cell['median_ms']:,.0f} tokens/s{peak}")
        rows.append(row)
    return table(["tokens", *names.values()], rows)


@speed_table("decoding summary", MODELS)
def decode_summary(runs: Sequence[Run]) -> str:
    """Tabulate a few cells of decoding, for the README."""
    cells, pairs = decoding_cells(runs), ((16_384, 8), (32_768, 4), (131_072, 4))
    rows = [
        [CACHES[variant], *(short(cells.get((variant, *pair), {}).get("tokens_per_second")) for pair in pairs)]
        for variant in ("sparse", "static", "dynamic")
    ]
    return table(["decoding, tokens/s", *(f"{n:,} x {batch}" for n, batch in pairs)], rows)
