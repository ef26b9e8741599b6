"""Tabulate the machine and the sizes that the benchmarks ran with."""

from speed_tables.attention import KERNELS
from speed_tables.cells import heads_of, table
from speed_tables.generate import GENERATE
from speed_tables.registry import Run, speed_table
from speed_tables.whole_models import MODELS


@speed_table("machine", KERNELS[0], MODELS[0])
def machine_table(kernels: Run, model: Run) -> str:
    """Tabulate the machine, the shape of the attention that was measured, and the check that came first."""
    versions, settings = kernels["versions"], kernels["settings"]
    worst = max(value for name, value in kernels["errors_against_float64"].items() if name != "tau")
    rows = [
        ["GPU", f"one {kernels['machine']['accelerator']}"],
        ["versions", ", ".join(f"{name} {versions[name]}" for name in ("torch", "cuda", "triton"))],
        ["copy of 4 GiB in its memory", f"{model['bandwidth'] / 1e12:.2f} TB/s"],
        ["query heads / KV heads x size", heads_of(settings)],
        ["batch", f"{settings['batch']}"],
        ["soft gates reach", f"{settings['support']:,} keys at most"],
        ["largest relative error against float64", f"{worst:.1e}"],
    ]
    return table(["of all runs, and of the attention", "value"], rows)


@speed_table("settings", KERNELS[0], MODELS[0], GENERATE[0])
def settings_table(kernels: Run, model: Run, generate: Run) -> str:
    """Tabulate the sizes that each benchmark ran with."""
    rows = []
    for name, run in (("attention", kernels), ("whole models", model), ("default `generate`", generate)):
        settings = run["settings"]
        sizes = [settings[key] for key in ("k", "window", "sinks")]
        numbers = [f"{n:,}" for n in (*sizes, sum(sizes))]
        rows.append([name, *numbers, settings["dtype"], run["versions"]["transformers"]])
    return table(["benchmark", "k", "window", "sinks", "keys of a query", "dtype", "transformers"], rows)
