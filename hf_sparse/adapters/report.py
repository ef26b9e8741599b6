"""The report of an adapter: one page that needs nothing else, and its pictures.

Everything on it comes from the JSON files in the adapter's folder. eval.json and finetune.json are measured by other
verbs; selection.json, what the scorers keep of a text, and graphs.json, which graphs a predictor makes of it, are
measured here because nothing but the pictures needs them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse.adapters.folder import EVALUATION, TRAINING, read_adapter
from hf_sparse.adapters.repo import (
    PICTURES,
    REPORT,
    check_evaluation,
    check_training,
    is_public,
    read_json,
    report_pictures,
)
from hf_sparse.adapters.results import Pictures, Results, results_of
from hf_sparse.atomic_files import write_json, write_text
from hf_sparse.data import select_chunks
from hf_sparse.errors import DataError
from hf_sparse.figures import training_figure
from hf_sparse.figures.style import reading
from hf_sparse.folders import staged
from hf_sparse.metrics import metric_of
from hf_sparse.overlap import sentence
from hf_sparse.workflow import Device, Dtype, alone, load_adapter, packed_chunks

_CHUNKS = ":8"  # of a text, unless told otherwise: enough for a mean, and few seconds


@alone
def write_report(
    folder: str | Path,
    text: str | None = None,
    text_name: str = "",
    *,
    length: int | None = None,
    chunks: str | None = None,
    bos: bool | None = None,
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
        length: tokens per chunk of the text; see `hf_sparse.workflow.tokens_per_chunk`.
        chunks: only chunks `START:STOP` of the text; by default the first 8.
        bos: see `hf_sparse.workflow.train_adapter`.
        device, dtype: see `hf_sparse.workflow.load_adapter`; the model is loaded for a text only.

    Returns:
        The path of the page.

    Raises:
        HubError: the folder holds no adapter, or its base model cannot be loaded.
        DataError: there is no eval.json, a measurement is damaged, or of other weights or settings, or a text is too
            short.
        BusyError: another run holds the folder.
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
    if training is not None:
        check_training(training, adapter)
    results = results_of(adapter.config)
    marks = {"scorers_sha256": adapter.weights_sha256, "settings_sha256": adapter.settings_sha256}
    if text is not None:
        model, tokenizer = load_adapter(folder, device=device, dtype=dtype)
        packed = packed_chunks(model, tokenizer, text, length, bos=bos)
        name = f"{text_name} (chunks {chunks})" if chunks else text_name
        found = results.describe(model, tokenizer, select_chunks(packed, chunks or _CHUNKS), text_name=name)
        aside: dict[str, Any] | None = {**found, **marks}
    elif aside := read_json(folder / results.aside):
        noted = {"settings_sha256": adapter.settings_sha256, **aside}  # which were not always
        aside = aside if {name: noted.get(name) for name in marks} == marks else None

    with reading(EVALUATION):
        metric = metric_of(evaluation)
    old: list[str] = []
    with staged(folder, removed=old) as stage:
        pictures = Pictures(stage / PICTURES, [])
        pictures.folder.mkdir()
        results.draw(pictures, evaluation, aside)
        if training is not None and training.get("history"):
            states = metric.key == "embedding_similarity"
            pictures.add("training", "loss at every optimiser step", training_figure, training, states=states)
        sources = f"{EVALUATION}, {TRAINING} or {results.aside}"
        with reading(sources):
            content = results.report(evaluation, aside, pictures.drawn)
        page = _render(
            results,
            sources,
            name=folder.resolve().name,
            base_model=adapter.base_model if is_public(adapter.base_model) else None,
            evaluation=evaluation,
            training=training,
            head_parameters=adapter.head_parameters,
            metric=metric,
            pictures={picture.name: picture for picture in pictures.drawn},
            **content,
        )
        write_text(stage / REPORT, page)
        if aside is not None:
            write_json(stage / results.aside, aside)
        old += report_pictures(folder, without={picture.name for picture in pictures.drawn})
    return folder / REPORT


def _render(results: Results, sources: str, **content: Any) -> str:
    """Render the page of a method; `DataError` if the content of the sources is not for it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

    environment = Environment(
        loader=FileSystemLoader([results.templates, Path(__file__).parent]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.globals.update(listed=_listed, seen=sentence)
    try:
        return environment.get_template("report.html.jinja").render(**content)
    except (UndefinedError, LookupError, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{sources} is not what hf-sparse writes: {error!r}") from error


def _listed(content: Mapping[str, Any]) -> str:
    """`{"cpus": 4, "torch_threads": 1}` as `cpus 4, torch threads 1`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in content.items())
