"""Write the report of an adapter: one page that needs nothing else, and its pictures.

Everything on it comes from the JSON files in the adapter's folder. eval.json and finetune.json are written by other
verbs. The details, such as which keys a text keeps, are measured here because nothing but the report needs them; each
method names their file.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.adapters.files import EVALUATION, PICTURES, REPORT, TRAINING, report_pictures
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.load import Device, Dtype, load_adapter
from hf_sparse.adapters.method_report import Json, Pictures
from hf_sparse.atomic_files import write_json, write_text
from hf_sparse.chunks import packed_chunks
from hf_sparse.data import select_chunks
from hf_sparse.errors import DataError
from hf_sparse.figures import training_figure
from hf_sparse.figures.style import reading
from hf_sparse.folders import exclusive, staged
from hf_sparse.metrics import metric_of
from hf_sparse.overlap import sentence

if TYPE_CHECKING:
    from jinja2 import Template

_CHUNKS = ":8"  # of a text, unless told otherwise: enough for a mean, and few seconds


@exclusive
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
        text: shows what the adapter attends to (see `MethodReport.describe`), if its method can tell, and becomes the
            method's file of details; by default the file that is there, if it is of the same adapter.
        text_name: the name of the text on the page.
        length: tokens per chunk of the text; see `hf_sparse.chunks.tokens_per_chunk`.
        chunks: only chunks `START:STOP` of the text; by default the first 8.
        bos: see `hf_sparse.workflow.train_adapter`.
        device, dtype: see `hf_sparse.adapters.load.load_adapter`; the model is loaded for a text only.

    Returns:
        The path of the page.

    Raises:
        HubError: the folder holds no adapter, or its base model cannot be loaded.
        DataError: there is no eval.json, a measurement is damaged, or of other weights or settings, a text is too
            short, or the method shows nothing of a text.
        BusyError: another run holds the folder.
    """
    adapter = AdapterFolder(folder)
    evaluation, training = adapter.checked_evaluation, adapter.checked_training
    if evaluation is None:
        raise DataError(
            f"{folder} has no {EVALUATION}, and a report shows what was measured: "
            f"`hf-sparse eval {folder} --text FILE` measures it"
        )
    if text is None:
        details = adapter.details
    else:
        name = f"{text_name} (chunks {chunks})" if chunks else text_name
        model, tokenizer = load_adapter(adapter, device=device, dtype=dtype)
        shown = select_chunks(packed_chunks(model, tokenizer, text, length, bos=bos), chunks or _CHUNKS)
        details = adapter.note_details(adapter.report.describe(model, tokenizer, shown, name))
    old: list[str] = []
    with staged(adapter.path, removed=old) as stage:
        pictures = Pictures(stage / PICTURES, [])
        pictures.folder.mkdir()
        _draw(adapter, pictures, evaluation, training, details)
        write_text(stage / REPORT, _page(adapter, pictures, evaluation, training, details))
        if details is not None and adapter.report.details_file is not None:
            write_json(stage / adapter.report.details_file, details)
        old += report_pictures(adapter.path, without={picture.name for picture in pictures.drawn})
    return adapter.path / REPORT


def _draw(
    adapter: AdapterFolder, pictures: Pictures, evaluation: Json, training: Json | None, details: Json | None
) -> None:
    """Draw the pictures of a method, and the loss where there was a training."""
    report = adapter.report
    with reading(EVALUATION):
        states = metric_of(evaluation).key == "embedding_similarity"
    report.draw(pictures, adapter.config, evaluation, details)
    if training is not None and training.get("history"):
        caption = "loss at every optimiser step"
        pictures.add("training", caption, training_figure, training, states=states, stages=report.stages)


def _page(
    adapter: AdapterFolder, pictures: Pictures, evaluation: Json, training: Json | None, details: Json | None
) -> str:
    """Render the page of an adapter; `DataError` if the content of the JSON files is not for it."""
    from jinja2 import UndefinedError

    details_file = adapter.report.details_file
    sources = f"{EVALUATION} or {TRAINING}" if details_file is None else f"{EVALUATION}, {TRAINING} or {details_file}"
    with reading(sources):
        content = adapter.report.report(evaluation, details, pictures.drawn)
    template = _template(adapter.report.templates)
    try:
        return template.render(
            name=adapter.name,
            base_model=adapter.public_base_model,
            evaluation=evaluation,
            training=training,
            head_parameters=adapter.head_parameters,
            metric=metric_of(evaluation),
            pictures={picture.name: picture for picture in pictures.drawn},
            **content,
        )
    except (UndefinedError, LookupError, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{sources} is not what hf-sparse writes: {error!r}") from error


@cache
def _template(folder: Path) -> "Template":
    """Return the compiled page of the method whose templates lie in a folder: compiling takes longer than filling."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.globals.update(listed=_listed, seen=sentence)
    return environment.get_template("report.html.jinja")


def _listed(content: Mapping[str, Any]) -> str:
    """Write `{"cpus": 4, "torch_threads": 1}` as `cpus 4, torch threads 1`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in content.items())
