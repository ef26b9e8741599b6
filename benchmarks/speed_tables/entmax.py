"""Tabulate entmax over all keys: runs of `entmax_kernels.py`."""

from collections.abc import Sequence

from speed_tables.cells import PASSES, heads_of, joined_rows, ratio, short, table, thousands
from speed_tables.registry import Run, speed_table

SMALL = ("entmax_kernels-h200", "entmax_kernels-earlier-h200")
LARGE = ("entmax_kernels-128-h200", "entmax_kernels-128-earlier-h200")
BIDIRECTIONAL = ("entmax_bidirectional-1-h200", "entmax_bidirectional-8-h200")
CONTENDERS = {
    "entmax exact": "entmax, all keys, exact",
    "adasplash 1": "AdaSplash 1, entmax over all keys",
    "adasplash 2": "AdaSplash 2, entmax over all keys",
    "sdpa flash": "SDPA flash, dense softmax",
    "sdpa cudnn": "SDPA cuDNN, dense softmax",
}


def captured(row: Run) -> str:
    """Write milliseconds in a CUDA graph and, in brackets, from Python."""
    return f"{short(row['captured_ms'])} ({short(row['median_ms'])})"


def rows_of(runs: Sequence[Run], which: str) -> list[Run]:
    """Return what was measured of one pass; the first run that has a cell counts."""
    measured = [{"rows": [row for row in run["rows"] if "error" not in row]} for run in runs]
    return [row for row in joined_rows(measured, "contender", "pass", "length") if row.get("pass") == which]


@speed_table("entmax settings", (SMALL, LARGE))
def entmax_setting_table(shapes: Sequence[Sequence[Run]]) -> str:
    """Tabulate the shapes that entmax was measured with, and the support that the drawn queries and keys have."""
    rows = []
    for runs in shapes:
        settings, keys = runs[0]["settings"], runs[0]["supports"]["8192"]["keys_per_query"]
        worst = max(max(run["errors_against_float64"].values()) for run in runs)
        spread = f"{sum(keys) / len(keys):.0f} ({min(keys):.0f} to {max(keys):.0f})"
        rows.append([heads_of(settings), f"{settings['alpha']}", spread, f"{worst:.1e}"])
    head = ["query heads / KV heads x size", "alpha", "keys with weight at 8,192 tokens (by head)", "largest error"]
    return table(head, rows)


@speed_table("entmax forward", SMALL, which="forward")
@speed_table("entmax forward and backward", SMALL, which="forward_backward")
@speed_table("entmax forward of large heads", LARGE, which="forward")
@speed_table("entmax forward and backward of large heads", LARGE, which="forward_backward")
def entmax_table(runs: Sequence[Run], which: str) -> str:
    """Tabulate one pass of entmax over all keys: milliseconds inside a CUDA graph and, in brackets, from Python."""
    cells = {(row["contender"], row["length"]): captured(row) for row in rows_of(runs, which)}
    lengths, measured = sorted({length for _, length in cells}), {contender for contender, _ in cells}
    rows = [
        [name, *(cells.get((contender, n), "-") for n in lengths)]
        for contender, name in CONTENDERS.items()
        if contender in measured
    ]
    return table([f"{PASSES[which]}, ms", *thousands(lengths)], rows)


@speed_table("both directions", BIDIRECTIONAL, which="forward")
@speed_table("both directions and backward", BIDIRECTIONAL, which="forward_backward")
def bidirectional_table(runs: Sequence[Run], which: str) -> str:
    """Tabulate one pass without a causal mask, as encoders have it, and what entmax takes beside the others.

    Cells are those of `entmax_table`. A ratio to SDPA is of times in a CUDA graph, that to AdaSplash 1, which a graph
    cannot hold, of times as called from Python."""
    others = ("adasplash 1", "sdpa flash", "sdpa cudnn")
    rows = []
    for run in runs:
        measured = rows_of([run], which)
        for length in sorted({row["length"] for row in measured}):
            of = {row["contender"]: row for row in measured if row["length"] == length}
            cells = [captured(of[name]) if name in of else "-" for name in ("entmax exact", *others)]
            for other in others:
                column = "median_ms" if other == "adasplash 1" else "captured_ms"
                cells.append(ratio(*(of.get(name, {}).get(column) for name in ("entmax exact", other))))
            rows.append([f"{length:,} x {run['settings']['batch']}", *cells])
    head = ["entmax, ms", "AdaSplash 1", "SDPA flash", "SDPA cuDNN"]
    head += ["*entmax / AdaSplash 1*", "*/ flash*", "*/ cuDNN*"]
    return table([f"{PASSES[which]}: tokens x batch", *head], rows)


@speed_table("errors of both directions", BIDIRECTIONAL[0])
@speed_table("errors of entmax", "entmax_prediction-h200")
def error_table(run: Run) -> str:
    """Tabulate the errors of entmax and AdaSplash against float64."""
    settings = run["settings"]
    shape = heads_of(settings)
    if settings.get("bidirectional"):
        shape += f", both directions, batch {settings['batch']}"
    ours = "entmax, tiles predicted" if run["benchmark"] == "entmax_prediction" else CONTENDERS["entmax exact"]
    others = {CONTENDERS[name]: errors for name, errors in run["errors_of_others"].items()}
    rows = []
    for name, errors in {ours: run["errors_against_float64"], **others}.items():
        if isinstance(errors, str):
            rows.append([shape, name, errors, "-"])
            continue
        gradients = max(value for key, value in errors.items() if key.startswith("d_"))
        rows.append([shape, name, f"{errors['output']:.1e}", f"{gradients:.1e}"])
    return table(["heads", "contender", "error of the output", "largest error of a gradient"], rows)
