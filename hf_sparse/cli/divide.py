"""Divide the slots of an adapter among its layers: `hf-sparse divide`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_sparse.cli.common import Folder, load_workflow, reading_options, say_written
from hf_sparse.cli.options import at_least, with_options


@with_options(reading=reading_options())
def divide(
    folder: Folder,
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="Training text, UTF-8; repeat for several.")],
    reading: dict[str, Any],
    batch_size: Annotated[int, typer.Option(help="Chunks at a time.", callback=at_least(1, "batch_size"))] = 1,
) -> None:
    """Divide the slots of the trained adapter in DIR among its layers, by what each loses; then finetune it again."""
    load_workflow()
    from hf_sparse.methods.sparsek.divide import divide_adapter
    from hf_sparse.texts import read_texts

    words, _ = read_texts(text)
    shares = divide_adapter(folder, words, batch_size=batch_size, **reading)
    console = Console()
    listed = ", ".join(f"{layer}: {share:.2f}" for layer, share in enumerate(shares))
    console.print(f"share of the slots by layer: {listed}", soft_wrap=True)
    say_written(console, folder, "adapter with layer_shares")
