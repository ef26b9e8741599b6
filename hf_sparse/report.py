"""The report of an adapter: one page that needs nothing else, and its pictures.

Everything on it comes from the JSON files in the adapter's folder. eval.json and finetune.json are measured by other
verbs; selection.json, what the scorers keep of a text, and graphs.json, which graphs a predictor makes of it, are
measured here because nothing but the pictures needs them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse.adapter import read_adapter
from hf_sparse.data import pack, select_chunks
from hf_sparse.errors import DataError
from hf_sparse.evaluation.graphs import describe_graphs
from hf_sparse.figures import (
    budgets_figure,
    divergence_figure,
    heads_figure,
    positions_figure,
    quality_figure,
    shade,
    task_figure,
    tokens_figure,
    training_figure,
)
from hf_sparse.figures.budgets import budgets_of
from hf_sparse.figures.kept import legend_of
from hf_sparse.figures.style import DENSE, look, ordered, reading
from hf_sparse.files import write_json, write_text
from hf_sparse.kept import describe_selection
from hf_sparse.methods.sparsefinder import SparsefinderAttention, SparsefinderConfig
from hf_sparse.metrics import Metric, metric_of
from hf_sparse.patches import methods_of
from hf_sparse.repo import EVALUATION, TRAINING, check_evaluation, is_public, read_json
from hf_sparse.report_graphs import GRAPHS, draw_graphs, render_graphs
from hf_sparse.report_page import PICTURES, REPORT, Picture, Pictures, remove_pictures, render_page
from hf_sparse.workflow import Device, Dtype, default_length, load_adapter, staged

SELECTION = "selection.json"

_CHUNKS = ":8"  # of a text, unless told otherwise: enough for a mean, and few seconds


def write_report(
    folder: str | Path,
    text: str | None = None,
    text_name: str = "",
    *,
    length: int | None = None,
    chunks: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> Path:
    """Write report.html and the folder figures/ for the adapter in a folder, all of it or nothing.

    What was not measured is left out, and the page names the command that would measure it.

    Args:
        folder: holds an adapter and its eval.json.
        text: shows which tokens the scorers keep, and becomes selection.json (of a Sparsefinder adapter, graphs of
            single heads, and graphs.json); by default the file that is there, if it is of the same adapter.
        text_name: what the text is called on the page.
        length: tokens per chunk of the text; see `hf_sparse.workflow.default_length`.
        chunks: only chunks `START:STOP` of the text; by default the first 8.
        device, dtype: see `hf_sparse.workflow.load_adapter`; the model is loaded for a text only.

    Returns:
        The path of the page.

    Raises:
        HubError: the folder holds no adapter, or its base model cannot be loaded.
        DataError: there is no eval.json, a measurement is damaged or of another budget, or a text is too short.
    """
    folder = Path(folder)
    adapter = read_adapter(folder, str(folder))
    evaluation, training = read_json(folder / EVALUATION), read_json(folder / TRAINING)
    if evaluation is None:
        raise DataError(
            f"{folder} has no {EVALUATION}, and a report shows what was measured: "
            f"`hf-sparse eval {folder} --text FILE` measures it"
        )
    check_evaluation(evaluation, adapter)
    graphs = isinstance(adapter.config, SparsefinderConfig)
    aside, draw, render = (GRAPHS, draw_graphs, render_graphs) if graphs else (SELECTION, _draw, _render)
    scorers = adapter.weights_sha256
    if text is not None:
        name = f"{text_name} (chunks {chunks})" if chunks else text_name
        measured = _select(folder, text, name, length, chunks or _CHUNKS, device, dtype)
        selection: dict[str, Any] | None = {**measured, "scorers_sha256": scorers}
    else:
        found = read_json(folder / aside)
        selection = found if found and found.get("scorers_sha256") == scorers else None

    base_model = adapter.base_model if is_public(adapter.base_model) else None
    with staged(folder) as stage, staged(folder / PICTURES) as place:
        pictures = Pictures(place, [])
        draw(pictures, evaluation, training, selection)
        drawn = pictures.drawn
        write_text(stage / REPORT, render(folder.resolve().name, base_model, evaluation, training, selection, drawn))
        if selection is not None:
            write_json(stage / aside, selection)
    remove_pictures(folder, keep={picture.name for picture in drawn})
    return folder / REPORT


def _select(
    folder: Path, text: str, name: str, length: int | None, chunks: str, device: Device, dtype: Dtype
) -> dict[str, Any]:
    """What the scorers keep of a text, or which graphs a predictor makes of it."""
    model, tokenizer = load_adapter(folder, device=device, dtype=dtype)
    encoder = not methods_of(model)[0].causal
    packed = pack(tokenizer, text, length or default_length(model), special_tokens=encoder)
    wanted = select_chunks(packed, chunks)
    if methods_of(model, SparsefinderAttention):
        return describe_graphs(model, wanted[:1], text_name=name)
    return describe_selection(model, tokenizer, wanted, text_name=name)


def _draw(
    pictures: Pictures, evaluation: dict[str, Any], training: dict[str, Any] | None, selection: dict[str, Any] | None
) -> None:
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
    if training is not None and training.get("history"):
        states = metric.key == "embedding_similarity"
        add("training", "loss at every optimiser step", training_figure, training, states=states)


def _render(
    name: str,
    base_model: str | None,
    evaluation: dict[str, Any],
    training: dict[str, Any] | None,
    selection: dict[str, Any] | None,
    drawn: list[Picture],
) -> str:
    """The page."""
    sources = f"{EVALUATION}, {TRAINING} or {SELECTION}"
    with reading(sources):
        metric = metric_of(evaluation)
        total = len(selection["heads"]) if selection else 0
        content: dict[str, Any] = {
            "metric": metric,
            "encoder": metric.key != "perplexity",
            "slots": int(evaluation["budget"]["slots"]),
            "names": _names(evaluation[metric.key]),
            "budgets": budgets_of(evaluation),
            "verdict": _verdict(metric, evaluation[metric.key]),
            "shades": [shade(kept, total) for kept in range(total + 1)] if total else [],
            "legend": legend_of(total) if total else [],
        }
    return render_page(
        "report.html.jinja",
        sources,
        name=name,
        base_model=base_model,
        evaluation=evaluation,
        training=training,
        selection=selection,
        pictures={picture.name: picture for picture in drawn},
        tasks=[picture for picture in drawn if picture.name.startswith("task-")],
        label=_label,
        **content,
    )


def _names(values: Mapping[str, Any]) -> list[str]:
    return [*(["dense"] if "dense" in values else []), *ordered(values)]


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
        best = (min if metric.best is None else max)(baselines, key=lambda name: baselines[name])
        said += f"; of the baselines at as many places the best is “{_label(best)}” with {metric.show(baselines[best])}"
    return said + "."
