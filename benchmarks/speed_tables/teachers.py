"""Tabulate teachers whose time is linear in the length: runs of both parts of `finetune_teacher.py`."""

from collections.abc import Sequence

from speed_tables.cells import table
from speed_tables.registry import Run, speed_table

TEACHERS = ("finetune_teacher-smollm2-cpu", "finetune_teacher-bundled-cpu")
TRAINED = ("finetune_teacher-smollm2-training-cpu", "finetune_teacher-bundled-training-cpu")


@speed_table("teacher operations", TRAINED[0])
def operations_table(run: Run) -> str:
    """Tabulate the operations of linear teachers by those of the dense one, which is arithmetic."""
    cells = {(row["shape"], row["tokens"], row["teacher"], row["window"]): row["share"] for row in run["operations"]}
    teachers = sorted({key[2:] for key in cells})
    rows = [
        [f"{shape}, {tokens:,} tokens", *(f"{cells[shape, tokens, *teacher]:.2f}" for teacher in teachers)]
        for shape, tokens in dict.fromkeys(key[:2] for key in cells)
    ]
    return table(["operations, dense = 1", *(f"{kind}, window {window:,}" for kind, window in teachers)], rows)


@speed_table("linear teachers", TEACHERS)
def teacher_table(runs: Sequence[Run]) -> str:
    """Tabulate the KL of linear teachers from the dense one."""
    rows = []
    for run in runs:
        for row in sorted(run["rows"], key=lambda row: (row["window"], row["teacher"], row["first"])):
            cells = [row["teacher"], str(row["window"]), str(row["first"]), f"{row['kl']:.4f}"]
            rows.append([f"{run['model']}, {run['length']:,}", *cells])
    return table(["base, tokens", "teacher", "window", "first tokens", "KL from the dense teacher"], rows)


@speed_table("taught", TRAINED)
def taught_table(runs: Sequence[Run]) -> str:
    """Tabulate the held-out quality of scorers that learned from each teacher, of each seed."""
    rows = []
    for run in runs:
        before = [f"{run['before']['kl']:.4f}", f"{run['before']['perplexity']:.2f}"]
        rows.append([run["model"], "untrained", "-", *before])
        for objective, window in dict.fromkeys((row["objective"], row["window"]) for row in run["rows"]):
            same = [row for row in run["rows"] if (row["objective"], row["window"]) == (objective, window)]
            label = "no teacher (`lm`)" if objective == "lm" else f"within {window}" if window else "dense"
            cells = [" / ".join(f"{row['kl']:.4f}" for row in same)]
            cells.append(" / ".join(f"{row['perplexity']:.2f}" for row in same))
            rows.append([run["model"], label, str(run["steps"]), *cells])
    return table(["base", "teacher", "steps", "KL from the dense model", "perplexity"], rows)
