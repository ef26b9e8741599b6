"""Publish an adapter: `hf-sparse push`."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from hf_sparse.cli.common import Folder, load_workflow

if TYPE_CHECKING:
    from hf_sparse.adapters.push_plan import PushPlan


def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name; created if it does not exist.")],
    form: Annotated[
        Literal["adapter", "full", "merged"],
        typer.Option(
            "--as",
            help="adapter: it alone. full: the base model's files with the adapter inside, which is dense without "
            "hf-sparse. merged: the same with LoRA added to the weights.",
        ),
    ] = "adapter",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where the adapter was made on a local folder.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="For the card, such as apache-2.0; by default what the base model's page on the Hub says."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request on an existing repository instead of pushing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be pushed; change nothing.")
    ] = False,
) -> None:
    """Publish the adapter in DIR with its card, alone or in a full model, in one commit.

    Log in with `hf auth login`, or set HF_TOKEN.
    """
    load_workflow()
    from hf_sparse.hub import plan_push, push_to_hub

    options: dict[str, Any] = {"form": form, "base_model": base_model, "license": license, "private": private}
    options |= {"revision": revision, "create_pr": create_pr}
    console = Console()
    if dry_run:
        for line in _lines(plan_push(folder, repo_id, **options)):
            console.print(escape(line), soft_wrap=True)
        return
    url = push_to_hub(folder, repo_id, **options)
    what = "opened a pull request with" if create_pr else "pushed"
    console.print(f"{what} {escape(str(folder))}{':' if create_pr else ' to'} {url}", soft_wrap=True)


def _lines(plan: "PushPlan") -> list[str]:
    """Say what a push would do, one thing per line."""
    target = f"a pull request on {plan.url}" if plan.create_pr else plan.url
    branch = f", branch {plan.revision}" if plan.revision else ""
    return [
        f"nothing was pushed; without --dry-run this goes to {target}{branch}:",
        *(f"  creates {thing}" for thing in plan.creates),
        *(f"  uploads {name} ({size:,} bytes)" for name, size in plan.uploads.items()),
        *(f"  deletes {name}" for name in plan.deletes),
    ]
