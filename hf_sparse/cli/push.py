"""Publish an adapter: `hf-sparse push`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hf_sparse.cli.common import Folder, load_workflow


def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where the adapter was made on a local folder.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="For the card, such as apache-2.0; by default what the base model's page on the Hub says."),
    ] = None,
) -> None:
    """Publish the adapter in DIR with its card, in one commit. Log in with `hf auth login`, or set HF_TOKEN."""
    load_workflow()
    from hf_sparse.hub import push_to_hub

    url = push_to_hub(folder, repo_id, private=private, base_model=base_model, license=license)
    Console().print(f"pushed {escape(str(folder))} to {url}", soft_wrap=True)
