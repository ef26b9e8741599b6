"""Define what several verbs have in common: arguments, options, and how they begin and end their work."""

from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from hf_sparse.cli.options import at_least, is_range, option

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter, made by `hf-sparse patch`.")]
Texts = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="UTF-8 text; may be repeated.")]
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


def say_written(console: Console, folder: Path, what: str) -> None:
    """Print what a verb wrote into a folder."""
    console.print(f"{what} in {escape(str(folder))}", soft_wrap=True)
