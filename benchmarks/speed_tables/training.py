"""Tabulate training of scorers at long texts and on several GPUs."""

import math
from collections.abc import Sequence
from typing import Any

from speed_tables.cells import gibibytes, hundredths, short, table
from speed_tables.registry import Run, speed_table

ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}


@speed_table("lengths", "finetune_length-h200")
def length_table(run: Run) -> str:
    """Tabulate training of scorers at long texts, a run of `finetune_length.py`."""
    rows = []
    for row in run["rows"]:
        if row["objective"] == "profile":
            continue
        settings = ["layers run again"] * row["gradient_checkpointing"] + ["MLPs and norms compiled"] * row["compiled"]
        settings += ["fp8"] * (row.get("mixed_precision") == "fp8")
        settings += [f"teacher within {row['teacher_window']:,}"] if row.get("teacher_window") else []
        cells = [f"{row['shape']}, {row['objective']}" + "".join(f", {one}" for one in settings), f"{row['tokens']:,}"]
        if "tokens_per_second" not in row:
            rows.append([*cells, row["error"].split(":")[0], "-", "-", "-"])
            continue
        share, peak = row["share_of_peak"], row["peak_memory_bytes"]
        cells += [f"{row['tokens_per_second']:,.0f}", short(row["hours_for_20M_tokens"])]
        rows.append([*cells, "-" if share is None else f"{share:.0%}", gibibytes(peak, 0) if peak else "-"])
    return table(["base, objective", "tokens", "tokens/s", "hours for 20 M tokens", "share of peak", "memory"], rows)


@speed_table("fp8", "finetune_fp8-h200")
def float8_table(run: Run) -> str:
    """Tabulate training in fp8 beside bfloat16; of two runs of a row the second counts, for the first one compiles."""
    last = {(row["shape"], row["compiled"], row["mixed_precision"]): row for row in run["rows"]}
    return length_table({"rows": list(last.values())})


@speed_table("several gpus", ("several_gpus-h200", "several_gpus-05ba201-h200"))
def gpus_table(runs: Sequence[Run]) -> str:
    """Tabulate training by several processes, one a GPU; of each case the process with the most memory counts."""
    cases: dict[str, dict[str, Any]] = {}
    launches: list[dict[str, Any]] = []
    for run in runs:
        known = {case["case"] for launch in launches for case in launch["cases"]}
        launches += [launch for launch in run["launches"] if not known & {case["case"] for case in launch["cases"]}]
    for case in (case for launch in launches for case in launch["cases"]):
        if case["case"].split()[-2] not in ENGINES or "resumed" in case["case"]:
            continue
        merged = cases.setdefault(case["case"], {"peak_memory_bytes": 0, "tokens_per_second": math.inf})
        merged["peak_memory_bytes"] = max(merged["peak_memory_bytes"], case["peak_memory_bytes"])
        merged["tokens_per_second"] = min(merged["tokens_per_second"], case["tokens_per_second"])
        merged.update({name: case[name] for name in ("efficiency", "difference", "base_share") if name in case})
    rows = []
    for name, case in sorted(cases.items(), key=lambda item: item[0].split()[:-2]):
        *what, engine, gpus = name.split()
        values = [hundredths(case.get(key)) for key in ("efficiency", "difference", "base_share")]
        label, speed = "one process" if gpus == "1" else ENGINES[engine], f"{case['tokens_per_second']:,.0f}"
        rows.append([" ".join(what), label, gpus, speed, *values, gibibytes(case["peak_memory_bytes"], 1)])
    head = ["case", "engine", "GPUs", "tokens/s of all", "efficiency", "difference", "share of base", "memory of a GPU"]
    return table(head, rows)
