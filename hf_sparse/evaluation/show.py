"""What was measured, for people."""

from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_sparse.metrics import metric_of
from hf_sparse.overlap import sentence


def table(result: dict[str, Any]) -> Table:
    """What `evaluate` returned, for people."""
    text, budget, speed = (result[key] for key in ("text", "budget", "tokens_per_second"))
    memory, apart, metric = result.get("kv_bytes"), result.get("divergence"), metric_of(result)
    caption = f"{text['chunks']} chunks of {text['length']} tokens" + (
        f" of {escape(text['name'])}" if text["name"] else ""
    )
    caption += f"\n{told}" if (told := sentence(text)) else ""
    parts = f"{budget['sinks']} sinks, window {budget['window']}, {budget['k']} selected"
    view = Table(title=f"{escape(str(result['base_model']))}: {parts}", caption=caption)
    view.add_column("attention", no_wrap=True)
    headers = ["keys per query", metric.name, *(["KL from dense, nats"] if apart else [])]
    headers += [f"KV cache at {memory['tokens']} tokens", "decoding, tokens/s"] if memory else ["forward, tokens/s"]
    for header in headers:
        view.add_column(header, justify="right")
    for name, value in result[metric.key].items():
        kind = "dense" if name == "dense" else "sparse"
        view.add_row(
            name,
            f"up to {text['length'] if kind == 'dense' else budget['slots']}",
            metric.show(value),
            *([f"{apart[name]:.4f}"] if apart else []),
            *([readable_bytes(memory[kind])] if memory else []),
            # The baselines run the same code as the scorers, which alone were timed.
            f"{speed[kind]:.1f}" if name in ("dense", "learned") else "",
            style="bold" if name == "learned" else None,
        )
    return view


def sweep_table(result: dict[str, Any]) -> Table:
    """The `sweep` of what `evaluate` returned: quality by slots, with the divergence from dense in brackets."""
    metric, sweep = metric_of(result), result["sweep"]
    brackets = " (KL from dense, nats per token)" if "divergence" in sweep[0] else ""
    title = f"{metric.name}{brackets} by slots"
    view = Table(title=title, min_width=len(title))
    view.add_column("attention", no_wrap=True)
    for entry in sweep:
        view.add_column(str(entry["slots"]), justify="right")
    for name in sweep[0][metric.key]:
        cells = [metric.show(entry[metric.key][name]) for entry in sweep]
        if brackets:
            cells = [f"{cell} ({entry['divergence'][name]:.4f})" for cell, entry in zip(cells, sweep, strict=True)]
        view.add_row(name, *cells, style="bold" if name == "learned" else None)
    return view


def task_table(name: str, task: dict[str, Any]) -> Table:
    """One entry of `tasks`: a score per selection and length, the mean over depths where there are depths."""
    results = task["results"]
    first = next(iter(results.values()))
    title, lengths = f"{name}: {task['metric']}", []
    if not name.endswith(" slots"):  # otherwise the name says it
        title += f" with {task['settings']['slots']} slots"
    if isinstance(first, dict):
        title += ", mean over depths" if "depths" in first else ""
        lengths = [f"{length} tokens" for length in first["lengths"]]
    view = Table(title=escape(title), min_width=len(title))  # a narrower table breaks its title into lines
    view.add_column("attention", no_wrap=True)
    for header in lengths or ["score"]:
        view.add_column(header, justify="right")
    for selection, found in results.items():
        values = [found]
        if isinstance(found, dict):
            values = found["values"]
            if "depths" in found:
                values = [fmean(column) for column in zip(*values, strict=True)]
        view.add_row(selection, *(f"{value:.2f}" for value in values), style="bold" if selection == "learned" else None)
    return view


def readable_bytes(count: int) -> str:
    """
    >>> readable_bytes(1_572_864)
    '1.50 MiB'
    """
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
