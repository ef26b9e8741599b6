"""Let an adapter continue a text: `hf-sparse generate`."""

import sys
from typing import Annotated, Any

import typer

from hf_sparse.cli.answering import ANSWERING, Answerer
from hf_sparse.cli.common import Folder
from hf_sparse.cli.errors import complain
from hf_sparse.cli.options import with_options


@with_options(answering=ANSWERING)
def generate(
    folder: Folder,
    answering: dict[str, Any],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue; - reads it from stdin.")],
) -> None:
    """Continue a text with the adapter in DIR; time and memory are shown on stderr."""
    text = sys.stdin.read() if prompt == "-" else prompt
    answerer = Answerer(folder, answering)
    from hf_sparse.data import prompt_tokens

    complain(answerer.answer(prompt_tokens(answerer.tokenizer, text)).summary())
