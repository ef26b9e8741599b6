"""Make tables for people of what was measured."""

from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_sparse.core.registry import registered_methods
from hf_sparse.metrics import metric_of
from hf_sparse.overlap import sentence


def table(result: dict[str, Any]) -> Table:
    """Return the first of the tables of what `evaluate` returned."""
    return tables(result)[0]


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of what `evaluate` returned, as the method shows it.

    Raises:
        ValueError: the content is of a method that is not registered.
    """
    for method in registered_methods().values():
        if (evaluation := method.evaluation()).made(result):
            views: list[Table] = evaluation.tables(result)
            return views
    raise ValueError(f"the result is of the method {result.get('method')!r}, which is not registered")


def comparison_table(result: dict[str, Any], title: str) -> Table:
    """Return the table of contenders that attend to as many keys each.

    Args:
        result: what `evaluate` returned.
        title: says, after the base model, how many keys that is.
    """
    text, budget, speed = result["text"], result.get("budget"), result["tokens_per_second"]
    memory, apart, metric = result.get("kv_bytes"), result.get("divergence"), metric_of(result)
    caption = f"{text['chunks']} chunks of {text['length']} tokens" + (
        f" of {escape(text['name'])}" if text["name"] else ""
    )
    caption += f"\n{told}" if (told := sentence(text)) else ""
    view = Table(title=f"{escape(str(result['base_model']))}: {title}", caption=caption)
    view.add_column("attention", no_wrap=True)
    headers = [*(["keys per query"] if budget else []), metric.name, *(["KL from dense, nats"] if apart else [])]
    headers += [f"KV cache at {memory['tokens']} tokens", "decoding, tokens/s"] if memory else ["forward, tokens/s"]
    for header in headers:
        view.add_column(header, justify="right", overflow="fold")  # a number is never cut
    for name, value in result[metric.key].items():
        kind = "dense" if name == "dense" else "sparse"
        view.add_row(
            name,
            *([f"up to {text['length'] if kind == 'dense' else budget['slots']}"] if budget else []),
            metric.show(value),
            *([f"{apart[name]:.4f}"] if apart else []),
            *([readable_bytes(memory[kind])] if memory else []),
            # The baselines run the same code as the scorers, which alone were timed.
            f"{speed[kind]:.1f}" if name in ("dense", "learned") else "",
            style="bold" if name == "learned" else None,
        )
    return view


def sweep_table(result: dict[str, Any]) -> Table:
    """Return the table of `sweep`: quality by slots, with the divergence from dense in brackets."""
    metric, sweep = metric_of(result), result["sweep"]
    brackets = " (KL from dense, nats per token)" if "divergence" in sweep[0] else ""
    title = f"{metric.name}{brackets} by slots"
    view = Table(title=title, min_width=len(title))
    view.add_column("attention", no_wrap=True)
    for entry in sweep:
        view.add_column(str(entry["slots"]), justify="right", overflow="fold")
    for name in sweep[0][metric.key]:
        cells = [metric.show(entry[metric.key][name]) for entry in sweep]
        if brackets:
            cells = [f"{cell} ({entry['divergence'][name]:.4f})" for cell, entry in zip(cells, sweep, strict=True)]
        view.add_row(name, *cells, style="bold" if name == "learned" else None)
    return view


def task_table(name: str, task: dict[str, Any]) -> Table:
    """Return the table of one of `tasks`: scores by contender and length, means over depths if any."""
    results = task["results"]
    first = next(iter(results.values()))
    title, lengths = f"{name}: {task['metric']}", []
    if "slots" in task["settings"] and not name.endswith(" slots"):  # otherwise the name says it
        title += f" with {task['settings']['slots']} slots"
    if isinstance(first, dict):
        title += ", mean over depths" if "depths" in first else ""
        lengths = [f"{length} tokens" for length in first["lengths"]]
    view = Table(title=escape(title), min_width=len(title))  # a narrower table breaks its title into lines
    view.add_column("attention", no_wrap=True)
    for header in lengths or ["score"]:
        view.add_column(header, justify="right", overflow="fold")
    for contender, scores in results.items():
        values = [scores]
        if isinstance(scores, dict):
            values = scores["values"]
            if "depths" in scores:
                values = [fmean(column) for column in zip(*values, strict=True)]
        view.add_row(contender, *(f"{value:.2f}" for value in values), style="bold" if contender == "learned" else None)
    return view


def readable_bytes(count: int) -> str:
    """Return a number of bytes in the largest unit of which there is one.

    >>> readable_bytes(1_572_864)
    '1.50 MiB'
    """
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
