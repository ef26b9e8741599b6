"""Write a report on an adapter: `hf-sparse report`."""

from typing import Any

import typer
from rich.console import Console

from hf_sparse.cli.common import (
    Dataset,
    Folder,
    Texts,
    check_source,
    dataset_options,
    load_workflow,
    read_source,
    reading_options,
    say_written,
)
from hf_sparse.cli.options import refuse_without, with_options


@with_options(part=dataset_options(), reading=reading_options("Only these chunks of the text; the first 8 by default."))
def report(
    context: typer.Context,
    folder: Folder,
    part: dict[str, Any],
    reading: dict[str, Any],
    text: Texts = None,
    dataset: Dataset = None,
) -> None:
    """Write report.html and figures/ in DIR from eval.json and finetune.json; of a text also what is attended to."""
    check_source(context, text, dataset, part, needed=False)
    if not (text or dataset):
        refuse_without(context, "--text or --dataset", ["length", "chunks", "bos"])
    load_workflow()
    from hf_sparse.adapters.report import write_report

    words, name = read_source(text, dataset, part)
    path = write_report(folder, words, name, **reading)
    say_written(Console(), folder, f"{path.name} and figures/")
