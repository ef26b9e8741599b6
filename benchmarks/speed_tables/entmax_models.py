"""Tabulate whole models with Sparsefinder: their forward, their conversion, and their steps."""

from collections.abc import Sequence
from statistics import median

from speed_tables.cells import ratio, short, table
from speed_tables.registry import Run, speed_table

VARIANTS = {
    "dense": "dense (SDPA)",
    "full": 'entmax, predictor "full"',
    "complete": "entmax, `complete=True`",
    "predicted": "entmax, predicted graph",
    "pooled": "entmax, tiles by means",
}


@speed_table("entmax models", ("entmax_model-4f339ee-h200", "entmax_model-h200"))
def entmax_model_table(runs: Sequence[Run]) -> str:
    """Tabulate milliseconds of a forward of a patched model, and how they compare with the dense one of the same run.

    A row names the commit of its run: hosts differ, which set the pace of short texts.
    """
    names = [name for name in VARIANTS if any(name in row for run in runs for row in run["rows"])]
    compared = [name for name in ("full", "complete", "pooled") if name in names]
    rows = []
    for run in runs:
        for row in sorted(run["rows"], key=lambda row: (row["batch"], row["length"])):
            times = {name: row[name]["ms"] for name in names if name in row}
            ratios = [ratio(times.get(name), times["dense"]) for name in compared]
            label = f"{row['length']:,} x {row['batch']}, {run['commit'][:7]}"
            rows.append([label, *(short(times.get(name)) for name in names), *ratios])
    head = ["tokens x batch", *(VARIANTS[name] for name in names), *(f"*{name} / dense*" for name in compared)]
    return table(head, rows)


@speed_table("conversion", "conversion-h200")
def conversion_table(run: Run) -> str:
    """Tabulate where the seconds of a training run went, stage by stage; the rest is fitting and measuring."""
    settings, rows, total = run["settings"], [], 0.0
    tokens = settings["length"] * settings["batch_size"] * settings["gradient_accumulation_steps"]
    for stage in dict.fromkeys(row["stage"] for row in run["history"]):
        seconds = [tokens / row["tokens_per_second"] for row in run["history"] if row["stage"] == stage]
        total += sum(seconds)
        rows.append([f"`{stage}`", f"{len(seconds)}", f"{1e3 * median(seconds):.0f}", f"{sum(seconds):.0f}"])
    rows.append(["fitting the predictors, and measuring", "", "", f"{run['seconds'] - total:.0f}"])
    rows.append(["all", "", "", f"{run['seconds']:.0f}"])
    return table(["stage", "steps", "ms per step", "seconds"], rows)


@speed_table("entmax steps", ("generate-entmax-h200", "generate-predicted-h200", "generate-entmax-more-h200"))
@speed_table("recorded entmax steps", ("generate-entmax-recorded-h200", "generate-predicted-recorded-h200"), calls=True)
def step_table(runs: Sequence[Run], calls: bool = False) -> str:
    """Tabulate steps of default `generate` with Sparsefinder, over all keys and over predicted graphs.

    With `calls`, whole calls with prompt and recording stand beside them."""
    rows = []
    for run in runs:
        settings = run["settings"]
        graph = "all keys" if settings["predictor"] == "full" else f"predicted, {settings['predictor']}"
        if settings.get("cluster_parts", 1) > 1:
            graph += f" in {settings['cluster_parts']} parts"
        for row in run["rows"]:
            cells = [f"{row['prompt']:,} x {row['batch']}", graph]
            for measured in ("step_ms", "call_ms") if calls else ("step_ms",):
                times = [row[name][measured] for name in ("dense", "sparse")]
                cells += [*map(short, times), ratio(*times)]
            rows.append(cells)
    head = ["SmolLM2's shape, prompt x batch", "keys", "dense, ms", "Sparsefinder, ms", "times as fast"]
    return table([*head, *(["call, dense, ms", "Sparsefinder, ms", "times as fast"] if calls else [])], rows)


@speed_table("compiled entmax steps", ("static_decode-8-layers-h200", "static_decode-predicted-h200"))
def static_table(runs: Sequence[Run]) -> str:
    """Tabulate compiled and captured steps in a static cache, dense and with Sparsefinder, and the bytes they read."""
    names = {"dense": "dense (SDPA)", "entmax": "entmax, all keys"}
    rows = []
    for run in runs:
        dense, *others = sorted(run["rows"], key=lambda row: row["attention"] != "dense")
        for row in (dense, *others):
            read = [f"{row['bytes_read'] / 1e9:.2f}", ratio(row["bytes_read"], dense["bytes_read"])]
            speed = [f"{row['tokens_per_second']:.0f}", ratio(row["tokens_per_second"], dense["tokens_per_second"])]
            name = names.get(row["attention"], f"entmax, {row.get('tiles')} predicted tiles of 8")
            name = f"{name}, {run['commit'][:7]}"
            rows.append([name, f"{run['settings']['layers']}", short(row["step_ms"]), *read, *speed])
    head = ["attention, commit", "layers", "ms per step", "GB read", "of dense", "tokens/s", "times as fast"]
    return table(head, rows)
