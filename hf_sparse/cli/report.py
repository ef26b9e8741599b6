"""Write a report on an adapter: `hf-sparse report`."""

from typing import Any

import typer
from rich.console import Console

from hf_sparse.cli.common import Folder, Texts, load_workflow, reading_options, say_written
from hf_sparse.cli.options import refuse_without, with_options


@with_options(reading=reading_options("Only these chunks of the text; the first 8 by default."))
def report(
    context: typer.Context,
    folder: Folder,
    reading: dict[str, Any],
    text: Texts = None,
) -> None:
    """Write report.html and figures/ in DIR from eval.json and finetune.json; of a --text also what is attended to."""
    if not text:
        refuse_without(context, "--text", ["length", "chunks", "bos"])
    load_workflow()
    from hf_sparse.adapters.report import write_report
    from hf_sparse.texts import read_texts

    words, name = read_texts(text) if text else (None, "")
    path = write_report(folder, words, name, **reading)
    say_written(Console(), folder, f"{path.name} and figures/")
