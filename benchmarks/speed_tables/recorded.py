"""Tabulate recorded steps, heads with different numbers of slots, and products that share an input."""

from collections.abc import Sequence

from speed_tables.cells import prompt_of, quotient, ratio, short, table
from speed_tables.registry import Run, speed_table


@speed_table("recorded", ("recorded-13ab898-h200", "recorded-be14ee1-h200", "recorded-h200", "recorded-earlier-h200"))
def recorded_table(runs: Sequence[Run]) -> str:
    """Tabulate the milliseconds of a step by recorded steps and by `generate`, and shares of the roofline.

    Each row names the commit of its run. Where a round took no time, its shorter call had compiled something, and
    there is no number.
    """
    names = ("dense", "sparse", "recorded", "recorded compiled")
    rows = []
    for run in runs:
        for row in run["rows"]:
            measured = {name: row[name] for name in names if name in row and min(row[name]["steps_ms"]) > 0}
            times = {name: steps["step_ms"] for name, steps in measured.items()}
            fastest = min(time for name, time in times.items() if name.startswith("recorded"))
            ratios = [quotient(times.get("dense"), time) for time in (times.get("recorded"), fastest)]
            cells = [short(value) for value in (*(times.get(name) for name in names), *ratios)]
            rows.append([f"{prompt_of(row)}, {run['commit'][:7]}", *cells, f"{row['ideal_ms'] / fastest:.0%}"])
    head = ["shape, prompt x batch", "dense, ms", "sparse, ms", "recorded, ms", "recorded, compiled, ms"]
    return table([*head, "dense / recorded", "dense / fastest", "fastest, of the roofline"], rows)


@speed_table(
    "first static", tuple(f"first_static{run}-h200" for run in ("-whole", "-heads-whole", "-631e60f", "-heads"))
)
def first_static_table(runs: Sequence[Run]) -> str:
    """Tabulate the seconds of the first calls of compiled or recorded decoding, and the graphs that were compiled.

    Each row names the commit of its run. A process that was cut has no numbers for the calls that it did not end. With
    `--whole` prompt and steps are one call.
    """
    rows = []
    for run in runs:
        for row in run["rows"]:
            prompt, first, longer, again = (row["calls_s"].get(n) for n in ("prompt", "first", "longer", "again"))
            both = prompt + first if prompt and first else None
            if run["settings"].get("whole"):
                first, both = None, first
            seconds = [prompt, first, both, longer, again, max(row.get("lengths_s", {}).values(), default=None)]
            heads = ", unequal heads" if run["settings"].get("head_shares") else ""
            name = f"{row['way']}{heads}, {run['commit'][:7]}"
            rows.append([name, *map(short, seconds), str(row["graphs"]), str(row.get("more_graphs", "-"))])
    head = ["seconds", "prompt alone", "call after it, 8 tokens", "both", "first of 64 tokens", "again"]
    return table([*head, "slowest of 10 lengths", "graphs", "more for 10 lengths"], rows)


@speed_table(
    "head shares",
    tuple(f"head_shares{run}-h200" for run in ("-4f339ee", "-4f339ee-2", "", "-d781133", "-2917fd7", "-c3c4339")),
)
def head_shares_table(runs: Sequence[Run]) -> str:
    """Tabulate heads with different numbers of slots beside equal ones, of runs of `head_shares.py`.

    A row has the times of the first run that has it, and the ratios of the others in their order.
    """
    names = ("equal", "by heads")
    cells: dict[tuple[str, str], list[tuple[list[float], str]]] = {}
    for run in runs:
        for row in run["rows"]:
            times = {f"step, {way}": [row[f"{n}, {way}"]["step_ms"] for n in names] for way in ("recorded", "eager")}
            times["first token"] = [row["first_token_ms"][name] for name in names]
            for what, pair in times.items():
                cells.setdefault((prompt_of(row), what), []).append((pair, run["commit"][:7]))
        for row in run["training"]:
            pair = [row[f"{name}, training"] for name in names]
            cell = (f"{row['shape']}, {row['tokens']:,}", "training step")
            cells.setdefault(cell, []).append((pair, run["commit"][:7]))
    rows = []
    for (name, what), ((newest, commit), *others) in cells.items():
        told = ", ".join(ratio(*pair) for pair, _ in others) or "-"
        rows.append([name, what, *map(short, newest), ratio(*newest), told, commit])
    head = ["shape, tokens x batch", "what", "equal, ms", "by heads, ms", "equal / by heads", "earlier runs", "commit"]
    return table(head, rows)


@speed_table("products", "products-h200")
def products_table(products: Run) -> str:
    """Tabulate the microseconds of products that share an input: by cuBLAS, in one kernel, and its share of a copy."""
    batches = sorted({row["rows"] for row in products["rows"]})
    cells: dict[str, dict[int, str]] = {}
    for row in products["rows"]:
        told = f"{short(row['cublas_us'])} / {short(row['kernel_us'])}, {row['kernel_share']:.0%}"
        cells.setdefault(f"{row['shape']}, {row['product']}", {})[row["rows"]] = told
    head = ["cuBLAS / kernel, us, of a copy", *(f"batch {batch}" for batch in batches)]
    return table(head, [[name, *(of.get(batch, "-") for batch in batches)] for name, of in cells.items()])


@speed_table("product sizes", "products-sizes-h200")
def product_sizes_table(searched: Run) -> str:
    """Tabulate the fastest sizes of the kernel of products, and what those in use cost when the search ran."""
    rows = []
    for row in searched["rows"]:
        best = row["search"][0]
        sizes = " x ".join(str(best[name]) for name in ("outputs", "columns", "parts", "warps", "stages"))
        cells = [" x ".join(map(str, row["sizes"])), short(row["kernel_us"]), sizes, short(best["us"])]
        name = f"{row['shape']}, {row['product']}, batch {row['rows']}"
        rows.append([name, *cells, ratio(row["kernel_us"], best["us"])])
    return table(["product", "in use", "us", "fastest", "us", "ratio"], rows)
