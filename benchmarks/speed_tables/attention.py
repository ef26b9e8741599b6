"""Tabulate and draw the attention of SparseK alone: runs of `attention_kernels.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sparse.figures.style import canvas
from speed_tables.cells import PASSES, check_settings, joined_rows, quotient, short, table, thousands
from speed_tables.registry import RESULTS, Run, reader, speed_table

KERNELS = ("kernels-launches-h200", "kernels-h200", "kernels-flash-h200")
SHAPES = (  # each with the commit of the run
    "9-3-64-8627aa2", "12-12-64-8627aa2", "28-4-128-8627aa2", "32-4-64-8627aa2", "32-8-64-8627aa2", "32-8-128-8627aa2",
)  # fmt: skip
CONTENDERS = {
    "sparsek hard": "SparseK, hard gates",
    "flex window": "FlexAttention, window, same number of keys",
    "sdpa cudnn": "SDPA cuDNN, dense",
    "sdpa flash": "SDPA flash, dense",
    "sparsek soft": "SparseK, soft gates, gradient of the scores only",
    "scan soft": "selection alone, soft",
}
THREE = ("sparsek hard", "flex window", "sdpa cudnn")


def medians(runs: Sequence[Run], which: str) -> dict[str, dict[int, float]]:
    """Return the milliseconds of one pass, by contender and length; the first run that has them counts."""
    check_settings(runs, "attention_kernels.py", "repeat_ms")  # how long each was repeated may differ
    found: dict[str, dict[int, float]] = {}
    for row in joined_rows(runs, "contender", "pass", "length"):
        if row.get("pass") == which:
            found.setdefault(row["contender"], {})[row["length"]] = row["median_ms"]
    return found


def lengths_of(runs: Sequence[Run]) -> list[int]:
    return sorted({row["length"] for run in runs for row in run["rows"]})


@speed_table("forward", KERNELS, which="forward")
@speed_table("forward and backward", KERNELS, which="forward_backward")
def kernel_table(runs: Sequence[Run], which: str) -> str:
    lengths, times = lengths_of(runs), medians(runs, which)
    rows = [
        [label, *(short(times[name].get(n)) for n in lengths)] for name, label in CONTENDERS.items() if name in times
    ]
    ours, window, dense = (times.get(name, {}) for name in THREE)
    rows.append(
        [
            "*SparseK, hard gates: times as long as the window*",
            *(short(quotient(ours.get(n), window.get(n))) for n in lengths),
        ]
    )
    rows.append(
        [
            "*SparseK, hard gates: times as fast as cuDNN*",
            *(short(quotient(dense.get(n), ours.get(n))) for n in lengths),
        ]
    )
    return table(["ms", *thousands(lengths)], rows)


@speed_table("larger support", ("kernels-support4096-h200",))
def wider_table(runs: Sequence[Run]) -> str:
    """Tabulate soft gates over a larger support."""
    lengths = lengths_of(runs)
    times = {title: medians(runs, which)["sparsek soft"] for which, title in PASSES.items()}
    rows = [[title, *(short(of_pass.get(n)) for n in lengths)] for title, of_pass in times.items()]
    return table(["ms", *thousands(lengths)], rows)


@speed_table("shapes", (*(f"kernels-shape-{shape}-h200" for shape in SHAPES), KERNELS[0]))
def shapes_table(runs: Sequence[Run]) -> str:
    """Tabulate several shapes: hard gates beside a window and dense attention.

    A length of a shape is that of the first run which has it.
    """
    found: dict[tuple[int, int, int], dict[int, list[str]]] = {}
    for run in runs:
        of_shape = found.setdefault(tuple(run["settings"][name] for name in ("query_heads", "kv_heads", "dim")), {})
        times = [medians([run], which) for which in PASSES]
        for length in set(lengths_of([run])) - of_shape.keys():
            cells = of_shape[length] = []
            for of_pass in times:
                ours, window, dense = (of_pass.get(name, {}).get(length) for name in THREE)
                cells += [*map(short, (ours, window, dense, quotient(ours, window)))]
            cells.append(run["commit"][:7])
    rows = [
        [f"{heads}/{kv_heads} x {dim}", f"{length:,}", *cells]
        for (heads, kv_heads, dim), of_shape in sorted(found.items())
        for length, cells in sorted(of_shape.items())
    ]
    names = ("SparseK", "window", "cuDNN", "SparseK / window")
    columns = [f"{name}, {title.lower()}" for title in PASSES.values() for name in names]
    return table(["heads x size", "tokens", *columns, "commit"], rows)


@speed_table("attention summary", KERNELS)
def attention_summary(runs: Sequence[Run]) -> str:
    """Tabulate a few lengths, for the README."""
    lengths = (16_384, 65_536, 131_072)
    times = [medians(runs, which) for which in PASSES]
    rows = [
        [CONTENDERS[name], *(" / ".join(short(of_pass[name].get(n)) for of_pass in times) for n in lengths)]
        for name in THREE
    ]
    return table(["ms: forward / forward and backward", *(f"{n:,} tokens" for n in lengths)], rows)


def draw(path: Path, folder: Path = RESULTS) -> None:
    """Draw the time of the forward, and of forward and backward, over the length."""
    from matplotlib.ticker import StrMethodFormatter

    looks: dict[str, tuple[str, str, float]] = {
        "sparsek hard": ("#0b6e99", "o", 2.4),
        "flex window": ("#d07a00", "s", 1.3),
        "sdpa cudnn": ("#555555", "^", 1.3),
    }
    runs: list[dict[str, Any]] = reader(folder)(KERNELS)
    lengths = lengths_of(runs)
    with canvas(path, 8.6, 3.6) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (which, title) in zip(panels, PASSES.items(), strict=True):
            times = medians(runs, which)
            for name, (colour, marker, width) in looks.items():
                points = zip(*sorted(times[name].items()), strict=True)
                axes.plot(*points, color=colour, marker=marker, linewidth=width, label=CONTENDERS[name])
            axes.set(title=title, yscale="log", xlabel="tokens")
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.grid(True)
        panels[0].set_ylabel("ms")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8.5)
