"""Tabulate the duration of `evaluate`, and of a training step on a busy CPU."""

from speed_tables.cells import short, table
from speed_tables.registry import Run, speed_table


@speed_table("evaluation", "evaluation-h200")
def evaluation_summary(evaluation: Run) -> str:
    """Tabulate the duration of one whole call of `evaluate`, and what it measured."""
    settings, whole = evaluation["settings"], evaluation["whole"]
    text = f"{settings['chunks']} of {settings['length']:,}"
    cells = [text, f"{whole['budgets']}", f"{whole['batch']}", short(whole["seconds"])]
    shape = f"{settings['shape']}, {settings['layers']} layers, one {evaluation['machine']['accelerator']}"
    return table(["model", "chunks", "budgets", "chunks at a time", "seconds"], [[shape, *cells]])


@speed_table("evaluation by contender", "evaluation-h200")
def evaluation_table(evaluation: Run) -> str:
    """Tabulate seconds per chunk of the forward of every contender, in the short and in the general way."""
    cells = {(row["contender"], row["general"]): row["seconds_per_chunk"] for row in evaluation["rows"]}
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(short_of_seconds(cells.get((name, general))) for general in (False, True))] for name in names]
    return table(["contender, seconds per chunk", "now", "general way, a chunk at a time"], rows)


def short_of_seconds(value: float | None) -> str:
    """Write seconds with three decimals below a second, and a dash for None."""
    return f"{value:.3f}" if value is not None and value < 1 else short(value)


@speed_table("busy cpu", "busy-cpu")
def busy_table(busy: Run) -> str:
    """Tabulate seconds of a training step by setting and number of competing processes."""
    cells = {(row["setting"], row["competing"]): row["step_s"] for row in busy["rows"]}
    numbers = sorted({number for _, number in cells})
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(short(cells.get((name, number))) for number in numbers)] for name in names]
    return table(["seconds of a step, beside other processes", *map(str, numbers)], rows)
