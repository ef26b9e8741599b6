"""Define what several verbs have in common: arguments, options, and how they begin and end their work."""

import os
from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from hf_sparse.cli.options import at_least, is_range, option, refuse_without

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_WIDE = 160  # columns, which the widest table needs

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter, made by `hf-sparse patch`.")]
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its name on the Hub.")]
Texts = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="UTF-8 text; may be repeated.")]
Dataset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Dataset on the Hub, or a folder or file (.jsonl, ...), instead of --text."),
]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Folder that the adapter is written to.")]


def reading_options(chunks: str = "Only these chunks of the text.") -> list[Parameter]:
    """Return the options of verbs that read a text with a model; `chunks` is the help of `--chunks`."""
    return [
        option(
            "length",
            int | None,
            None,
            "Tokens per chunk, more than a query attends to at most; by default 2048, or what the adapter's method is "
            "meant for, or the model's context if shorter.",
            callback=at_least(2, "length", "tokens"),
        ),
        option("chunks", str | None, None, chunks, metavar="START:STOP", callback=is_range),
        option(
            "bos",
            bool | None,
            None,
            "Begin the chunks of a decoder with the BOS token, or not; by default as its tokenizer begins a text.",
            "--bos/--no-bos",
        ),
        *model_options(),
    ]


def dataset_options() -> list[Parameter]:
    """Return the options that say what is read of a `--dataset`."""
    return [
        option("dataset_config", str | None, None, "Configuration of the dataset."),
        option("split", str, "train", "Part of the dataset, such as train[:1%]."),
        option("column", str, "text", "Column of the dataset that holds the text."),
    ]


def check_source(
    context: typer.Context, text: list[Path] | None, dataset: str | None, part: Mapping[str, Any], *, needed: bool
) -> None:
    """Refuse two sources of text, none where one is needed, and options about a dataset where there is none.

    Raises:
        typer.BadParameter: one of these.
    """
    if (text and dataset) or (needed and not (text or dataset)):
        raise typer.BadParameter("expected either --text FILE or --dataset NAME")
    if not dataset:
        refuse_without(context, "--dataset", part)


def read_source(text: list[Path] | None, dataset: str | None, part: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the words of `--text` or `--dataset`, and what they are called; `None` where neither was given.

    Args:
        text: files.
        dataset: see `hf_sparse.texts.read_dataset`.
        part: the values of `dataset_options` by name.

    Raises:
        DataError: a file or a dataset that cannot be read, or holds no text.
    """
    from hf_sparse.texts import read_dataset, read_texts

    if not dataset:
        return read_texts(text) if text else (None, "")
    words = read_dataset(dataset, part["dataset_config"], part["split"], part["column"])
    name = Path(dataset).name if Path(dataset).exists() else dataset
    return words, f"{name} ({', '.join(filter(None, (part['dataset_config'], part['split'])))})"


def model_options() -> list[Parameter]:
    """Return the options of verbs that load an adapter with its base model."""
    return [
        option("device", Literal["auto", "cpu", "cuda"], "auto", "auto: CUDA where there is a GPU."),
        option(
            "dtype",
            Dtype,
            "auto",
            "Dtype of the base model. auto: bfloat16 on CUDA if it is stored so, else float32.",
        ),
    ]


def load_workflow() -> Any:
    """Import the library and register the methods, with transformers' own bars and notes off the screen.

    Returns:
        The module `hf_sparse.workflow`, whose functions are behind the verbs.
    """
    import_module("hf_sparse.library")  # registers the methods, which `import hf_sparse` left to this function
    from transformers.utils import logging

    from hf_sparse import workflow

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return workflow


def console_for_tables() -> Console:
    """Return a console on stdout that is wide without a terminal: for a file or a pipe rich takes 80 columns."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_WIDE)


def is_measured(folder: Path) -> bool:
    """Tell whether there are measurements in a folder, which a verb that changes the adapter takes away."""
    from hf_sparse.adapters.files import EVALUATION

    return (folder / EVALUATION).exists()


def say_written(console: Console, folder: Path, what: str, *, was_measured: bool = False) -> None:
    """Print what a verb wrote into a folder, and whether it took away what was measured of the adapter before."""
    console.print(f"{what} in {escape(str(folder))}", soft_wrap=True)
    if was_measured:
        gone = "eval.json was of the adapter before, and is gone: `hf-sparse eval` measures this one"
        console.print(gone, soft_wrap=True)
