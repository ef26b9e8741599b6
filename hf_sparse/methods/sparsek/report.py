"""What is measured of a SparseK adapter, its card and its report."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_sparse.adapters.folder import EVALUATION
from hf_sparse.adapters.results import Picture, Pictures, Results
from hf_sparse.errors import DataError
from hf_sparse.figures.style import DENSE, LOOKS, look, ordered, reading
from hf_sparse.methods.sparsek import SparseKConfig
from hf_sparse.methods.sparsek.figures import (
    budgets_figure,
    divergence_figure,
    heads_figure,
    positions_figure,
    quality_figure,
    shade,
    task_figure,
    tokens_figure,
)
from hf_sparse.methods.sparsek.figures.budgets import budgets_of
from hf_sparse.methods.sparsek.figures.kept import legend_of
from hf_sparse.methods.sparsek.kept_keys import describe_selection
from hf_sparse.metrics import Metric, metric_of

#: Selections of eval.json in the order of the table; `{}` is the number of slots.
_ROWS = {
    "dense": "all (dense attention of the base model)",
    "learned": "**{}: window, sinks, and the best-scored {} ones (this adapter)**",
    "recency": "{}: the most recent ones, and sinks",
    "window": "{}: the nearest ones, and sinks",
    "random": "{}: window, sinks, and {} ones at random",
    "key_norm": "{}: window, sinks, and the {} keys of smallest norm",
    "key_difference": "{}: window, sinks, and the {} keys least like the others (KeyDiff)",
    "h2o": "{}: window, sinks, and the {} ones most attended so far (H2O)",
    "tova": "{}: window, sinks, and the {} ones that the last query attends to most (TOVA)",
    "snapkv": "{}: window, sinks, and the {} ones that the latest queries vote for (SnapKV)",
    "oracle": "{}: window, sinks, and the {} ones that later queries will attend to most (sees the future)",
}

_WEAK = 0.5  # a base model that scores less cannot do the task


def _check(evaluation: dict[str, Any], config: SparseKConfig) -> None:
    own = {name: getattr(config, name) for name in ("k", "window", "sinks", "slots")}
    if evaluation.get("budget") != own:
        raise DataError(f"{EVALUATION} is of the budget {evaluation.get('budget')}, but the adapter has {own}")


def _card(config: SparseKConfig, evaluation: dict[str, Any] | None, encoder: bool) -> dict[str, Any]:
    kept = "other" if encoder else "older"
    labels = {"dense": DENSE, **{name: shown.label for name, shown in LOOKS.items()}}
    return {
        "rows": {name: label.format(config.slots, kept) for name, label in _ROWS.items()},
        "labels": labels,
        "budgets": budgets_of(evaluation) if evaluation else [],
        "tasks": [_task(name, task, labels) for name, task in (evaluation or {}).get("tasks", {}).items()],
    }


def _task(name: str, task: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """A task of eval.json as the card shows it: mean scores, those of each depth too, and what beats the scorers."""
    results: dict[str, Any] = task["results"]
    first = next(iter(results.values()))
    columns, depths = ["score"], None  # a number for each selection
    if isinstance(first, dict):
        columns, depths = [f"{length:,} tokens" for length in first["lengths"]], first.get("depths")
    scores: dict[str, list[list[float]]] = {}  # of each selection and length, at each depth
    for chosen, found in results.items():
        values = found["values"] if isinstance(found, dict) else [found]
        scores[chosen] = [list(column) for column in zip(*values, strict=True)] if depths else [[v] for v in values]
    means = {chosen: [fmean(column) for column in columns] for chosen, columns in scores.items()}
    own = means.get("learned", [1.0] * len(columns))
    others = [chosen for chosen in means if chosen not in ("dense", "learned")]
    better = {
        column: [labels[name] for name in others if means[name][at] > own[at]] for at, column in enumerate(columns)
    }
    return {
        "title": name.replace("_", " ").capitalize(),
        "metric": task["metric"].replace("_", " "),
        "settings": task["settings"],
        "columns": columns,
        "depths": depths,
        "rows": {labels[chosen]: [_scores(column) for column in columns] for chosen, columns in scores.items()},
        "better": {column: names for column, names in better.items() if names},
        "weak": weak if "dense" in means and (weak := fmean(means["dense"])) < _WEAK else None,
    }


def _scores(values: list[float]) -> str:
    mean = f"{fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{value:.2g}' for value in values)})"


def _draw(pictures: Pictures, evaluation: dict[str, Any], selection: dict[str, Any] | None) -> None:
    """Draw all pictures for which there are measurements."""
    with reading(EVALUATION):
        metric, budgets, tasks = metric_of(evaluation), budgets_of(evaluation), dict(evaluation.get("tasks") or {})
    add = pictures.add
    if len(budgets) > 1:
        add("budgets", f"{metric.name} of every selection against the budget", budgets_figure, evaluation)
    add("quality", f"{metric.name} of every selection at the adapter's own budget", quality_figure, evaluation, None)
    if evaluation.get("divergence"):
        add("divergence", "KL divergence from dense of every selection", divergence_figure, evaluation)
    if evaluation.get("by_position"):
        add("positions", f"{metric.name} by position in the text", positions_figure, evaluation)
    for name, task in tasks.items():
        file = "task-" + re.sub(r"[^\w-]", "-", name)
        add(file, f"{name.replace('_', ' ')}, for every selection", task_figure, name, task)
    if selection is not None:
        add("heads", "share of keys that each head keeps, over positions", heads_figure, selection)
        add("tokens", "tokens of a text, coloured by how many heads keep them", tokens_figure, selection)


def _report(evaluation: dict[str, Any], selection: dict[str, Any] | None, drawn: Sequence[Picture]) -> dict[str, Any]:
    metric = metric_of(evaluation)
    values = evaluation[metric.key]
    total = len(selection["heads"]) if selection else 0
    return {
        "encoder": metric.key != "perplexity",
        "slots": int(evaluation["budget"]["slots"]),
        "names": [*(["dense"] if "dense" in values else []), *ordered(values)],
        "budgets": budgets_of(evaluation),
        "verdict": _verdict(metric, values),
        "shades": [shade(kept, total) for kept in range(total + 1)] if total else [],
        "legend": legend_of(total) if total else [],
        "tasks": [picture for picture in drawn if picture.name.startswith("task-")],
        "label": _label,
        "selection": selection,
    }


def _label(name: str) -> str:
    return DENSE if name == "dense" else look(name).label


def _verdict(metric: Metric, values: Mapping[str, float]) -> str:
    """One sentence on what the scorers are worth; empty if they were not measured."""
    if "learned" not in values:
        return ""
    said = f"The scorers have a {metric.name} of {metric.show(values['learned'])}"
    if "dense" in values:
        change = f" ({100 * (values['learned'] / values['dense'] - 1):+.1f} %)" if metric.relative else ""
        said += f"{change}, dense attention {metric.show(values['dense'])}"
    baselines = {name: value for name, value in values.items() if name not in ("dense", "learned", "oracle")}
    if baselines:
        best = metric.best_of(baselines)
        said += f"; of the baselines at as many places the best is “{_label(best)}” with {metric.show(baselines[best])}"
    return said + "."


SPARSEK = Results(
    name="sparsek",
    templates=Path(__file__).parent,
    tags=(),
    check=_check,
    figure="quality.png",
    draw_figure=quality_figure,
    card=_card,
    aside="selection.json",
    describe=describe_selection,
    pictures=("quality", "budgets", "divergence", "positions", "task-*", "heads", "tokens"),
    draw=_draw,
    report=_report,
)
