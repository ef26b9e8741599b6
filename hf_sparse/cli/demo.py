"""Do all of it on the bundled checkpoint: `hf-sparse demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_sparse.cli.common import Output, load_workflow
from hf_sparse.demo import STEPS


def demo(
    output: Output = Path("demo-output"),
    steps: Annotated[int, typer.Option(help="Training steps; fewer are faster and worse.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of the order of the text.")] = 0,
) -> None:
    """Patch the bundled checkpoint, train, measure, and write what could be pushed, all of it offline."""
    load_workflow()
    from hf_sparse.demo.run import run

    run(output, steps, seed, Console())
