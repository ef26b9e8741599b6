"""Divide the slots of an adapter among its layers or heads: `hf-sparse divide`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hf_sparse.cli.common import Folder, is_measured, load_workflow, reading_options, say_written
from hf_sparse.cli.options import at_least, with_options


@with_options(reading=reading_options("Only these chunks; by default at most 4, from all over the text."))
def divide(
    folder: Folder,
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="Training text, UTF-8; repeat for several.")],
    reading: dict[str, Any],
    among: Annotated[
        Literal["layers", "heads"],
        typer.Option(help="'heads' gives every KV head a number of selected keys of its own; it measures longer."),
    ] = "layers",
    batch_size: Annotated[int, typer.Option(help="Chunks at a time.", callback=at_least(1, "batch_size"))] = 1,
) -> None:
    """Divide the slots of the trained adapter in DIR among its parts, by what each loses; then finetune it again."""
    load_workflow()
    from hf_sparse.methods.sparsek.divide import divide_adapter
    from hf_sparse.texts import read_texts

    words, _ = read_texts(text)
    measured = is_measured(folder)
    shares = divide_adapter(folder, words, among=among, batch_size=batch_size, **reading)
    console = Console()
    if among == "heads":
        rows = [" ".join(f"{share:.2f}" for share in row) for row in shares]
        listed = ", ".join(f"{layer}: {row}" for layer, row in enumerate(rows))
        console.print(f"share of the selected keys by layer and KV head: {listed}", soft_wrap=True)
    else:
        listed = ", ".join(f"{layer}: {share:.2f}" for layer, share in enumerate(shares))
        console.print(f"share of the slots by layer: {listed}", soft_wrap=True)
    say_written(
        console, folder, f"adapter with {'head' if among == 'heads' else 'layer'}_shares", was_measured=measured
    )
