"""Tell cards and reports of the measurements of a SparseK adapter."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_sparse.adapters.files import EVALUATION
from hf_sparse.adapters.method_report import Json, MethodReport, Picture, Pictures
from hf_sparse.core.config import SparseConfig
from hf_sparse.errors import DataError
from hf_sparse.figures.style import reading
from hf_sparse.methods.sparsek.figures import (
    budgets_figure,
    divergence_figure,
    heads_figure,
    positions_figure,
    quality_figure,
    shade,
    shares_figure,
    task_figure,
    tokens_figure,
)
from hf_sparse.methods.sparsek.figures.budgets import budgets_of
from hf_sparse.methods.sparsek.figures.kept import legend_of
from hf_sparse.methods.sparsek.figures.looks import LOOKS, STAGES
from hf_sparse.methods.sparsek.kept_keys import describe_selection
from hf_sparse.metrics import Metric, metric_of

#: Selections of eval.json in the order of the table; `{}` is the number of slots.
_ROWS = {
    "dense": "all (dense attention of the base model)",
    "learned": "**{}: window, sinks, and the best-scored {} ones (this adapter)**",
    "recency": "{}: the most recent ones, and sinks",
    "window": "{}: the nearest ones, and sinks",
    "random": "{}: window, sinks, and {} ones at random",
    "prompt_random": "{}: window, sinks, the beginning of the text and random ones in {} places",
    "key_norm": "{}: window, sinks, and the {} keys of smallest norm",
    "key_difference": "{}: window, sinks, and the {} keys least like the others (KeyDiff)",
    "h2o": "{}: window, sinks, and the {} ones most attended so far (H2O)",
    "tova": "{}: window, sinks, and the {} ones that the last query attends to most (TOVA)",
    "snapkv": "{}: window, sinks, and the {} ones that the latest queries vote for (SnapKV)",
    "oracle": "{}: window, sinks, and the {} ones that later queries will attend to most (sees the future)",
}

_WEAK = 0.5  # a base model that scores less cannot do the task


class SparseKReport(MethodReport):
    """Show budgets, baselines with equal slots, tasks, and which keys a text keeps."""

    name = "sparsek"
    templates = Path(__file__).parent
    figure = "quality.png"
    details_file = "selection.json"
    pictures = ("quality", "budgets", "divergence", "positions", "task-*", "shares", "heads", "tokens")
    objectives: ClassVar = {
        "attention": "The objective was to predict, for each key, the dense attention that it receives from far "
        "queries."
    }
    stages: ClassVar = STAGES

    def check(self, evaluation: Json, config: SparseConfig) -> None:
        budget = {name: getattr(config, name) for name in ("k", "window", "sinks", "slots")}
        if evaluation.get("budget") != budget:
            raise DataError(f"{EVALUATION} is of the budget {evaluation.get('budget')}, but the adapter has {budget}")

    def tags(self, both_ways: bool) -> Sequence[str]:
        return () if both_ways else ("kv-cache", "long-context")

    def card(self, config: Any, evaluation: Json | None, both_ways: bool) -> Json:
        kept = "other" if both_ways else "older"
        labels = {name: LOOKS.label(name) for name in ("dense", *LOOKS.by_name)}
        shares = config.layer_shares or config.head_shares
        layers = range(len(shares or [1.0]))
        return {
            "fewest": min(config.budget(layer).fewest_slots for layer in layers),
            "on_average": " on average" if shares else "",
            "rows": {name: label.format(config.slots, kept) for name, label in _ROWS.items()},
            "labels": labels,
            "budgets": budgets_of(evaluation) if evaluation else [],
            "tasks": [_task(name, task, labels) for name, task in (evaluation or {}).get("tasks", {}).items()],
        }

    def draw_figure(self, evaluation: Json, training: Json | None, path: Path) -> None:
        quality_figure(evaluation, training, path)

    def describe(self, model: nn.Module, tokenizer: Any, chunks: Tensor, text_name: str) -> Json:
        return describe_selection(model, tokenizer, chunks, text_name=text_name)

    def draw(self, pictures: Pictures, config: Any, evaluation: Json, details: Json | None) -> None:
        with reading(EVALUATION):
            metric, budgets, tasks = metric_of(evaluation), budgets_of(evaluation), dict(evaluation.get("tasks") or {})
        add = pictures.add
        if len(budgets) > 1:
            add("budgets", f"{metric.name} of every selection against the budget", budgets_figure, evaluation)
        caption = f"{metric.name} of every selection at the adapter's own budget"
        add("quality", caption, quality_figure, evaluation, None)
        if evaluation.get("divergence"):
            add("divergence", "KL divergence from dense of every selection", divergence_figure, evaluation)
        if evaluation.get("by_position"):
            add("positions", f"{metric.name} by position in the text", positions_figure, evaluation)
        for name, task in tasks.items():
            file = "task-" + re.sub(r"[^\w-]", "-", name)
            add(file, f"{name.replace('_', ' ')}, for every selection", task_figure, name, task)
        if shares := config.layer_shares or config.head_shares:
            heads = (config.base_shape or {}).get("num_key_value_heads", 1)
            counts = [config.budget(layer).per_head(heads) for layer in range(len(shares))]
            add("shares", "selected keys of every KV head", shares_figure, counts)
        if details is not None:
            add("heads", "share of keys that each head keeps, over positions", heads_figure, details)
            add("tokens", "tokens of a text, coloured by how many heads keep them", tokens_figure, details)

    def report(self, evaluation: Json, details: Json | None, drawn: Sequence[Picture]) -> Json:
        metric = metric_of(evaluation)
        values = evaluation[metric.key]
        total = len(details["heads"]) if details else 0
        return {
            "encoder": metric.key != "perplexity",
            "slots": int(evaluation["budget"]["slots"]),
            "names": [*(["dense"] if "dense" in values else []), *LOOKS.ordered(values)],
            "budgets": budgets_of(evaluation),
            "verdict": _verdict(metric, values),
            "shades": [shade(kept, total) for kept in range(total + 1)] if total else [],
            "legend": legend_of(total) if total else [],
            "tasks": [picture for picture in drawn if picture.name.startswith("task-")],
            "label": LOOKS.label,
            "selection": details,
        }


def _task(name: str, task: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """Return a task of eval.json as the card shows it: mean scores, those of each depth too, and what beats scorers."""
    results: dict[str, Any] = task["results"]
    first = next(iter(results.values()))
    columns, depths = ["score"], None  # a number for each selection
    if isinstance(first, dict):
        columns, depths = [f"{length:,} tokens" for length in first["lengths"]], first.get("depths")
    scores: dict[str, list[list[float]]] = {}  # of each selection and length, at each depth
    for chosen, result in results.items():
        values = result["values"] if isinstance(result, dict) else [result]
        scores[chosen] = [list(column) for column in zip(*values, strict=True)] if depths else [[v] for v in values]
    means = {chosen: [fmean(column) for column in columns] for chosen, columns in scores.items()}
    learned = means.get("learned", [1.0] * len(columns))
    others = [chosen for chosen in means if chosen not in ("dense", "learned")]
    better = {
        column: [labels[name] for name in others if means[name][index] > learned[index]]
        for index, column in enumerate(columns)
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
    """Write the mean of scores, and the scores where there are several."""
    mean = f"{fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{value:.2g}' for value in values)})"


def _verdict(metric: Metric, values: Mapping[str, float]) -> str:
    """Say in one sentence what the scorers are worth; nothing if they were not measured."""
    if "learned" not in values:
        return ""
    sentence = f"The scorers have a {metric.name} of {metric.show(values['learned'])}"
    if "dense" in values:
        change = f" ({100 * (values['learned'] / values['dense'] - 1):+.1f} %)" if metric.relative else ""
        sentence += f"{change}, dense attention {metric.show(values['dense'])}"
    baselines = {name: value for name, value in values.items() if name not in ("dense", "learned", "oracle")}
    if baselines:
        best = metric.best_of(baselines)
        value = metric.show(baselines[best])
        sentence += f"; of the baselines at as many places the best is “{LOOKS.label(best)}” with {value}"
    return sentence + "."
