"""Leave the layers of an adapter dense whose attention is not sparse: `hf-sparse unpatch`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_sparse.cli.common import Folder, is_measured, load_workflow, reading_options, say_written
from hf_sparse.cli.options import with_options


@with_options(reading=reading_options("Only these chunks; by default at most 4, from all over the text."))
def unpatch(
    folder: Folder,
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="Training text, UTF-8; repeat for several.")],
    reading: dict[str, Any],
    above: Annotated[
        float, typer.Option(help="Share of the keys with weight above which a layer is left dense.")
    ] = 0.15,
) -> None:
    """Take layers whose attention is not sparse out of the trained Sparsefinder adapter in DIR: they are dense again.

    Measured is entmax over all keys in every layer; `layers` in adapter_config.json names those that stay.
    """
    load_workflow()
    from hf_sparse.methods.sparsefinder.unpatch import unpatch_adapter
    from hf_sparse.texts import read_texts

    words, _ = read_texts(text)
    measured = is_measured(folder)
    densities = unpatch_adapter(folder, words, above=above, **reading)
    console = Console()
    listed = ", ".join(f"{layer}: {density:.1%}" for layer, density in densities.items())
    console.print(f"share of the keys with weight by layer: {listed}", soft_wrap=True)
    dense = [str(layer) for layer, density in densities.items() if density > above]
    if not dense:
        console.print(f"no layer is above {above:.0%}: nothing was changed")
        return
    console.print(f"left dense: {', '.join(dense)}")
    say_written(console, folder, "adapter of the other layers", was_measured=measured)
