"""Make a folder that vLLM opens: `hf-sparse export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_sparse.cli.common import Adapter, load_workflow, say_written


def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the base model's files, where links would not do.")
    ] = False,
) -> None:
    """Write a folder that `vllm serve OUT` opens for an adapter, with links to the base model's files."""
    load_workflow()
    from hf_sparse.serving.export import export as write

    write(adapter, output, copy=copy)
    say_written(Console(), output, "a model for vLLM")
