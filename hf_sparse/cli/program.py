"""Put the verbs together to one program."""

import os
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from hf_sparse.cli.chat import chat
from hf_sparse.cli.demo import demo
from hf_sparse.cli.divide import divide
from hf_sparse.cli.errors import OneLineErrors
from hf_sparse.cli.evaluate import evaluate
from hf_sparse.cli.export import export
from hf_sparse.cli.finetune import finetune
from hf_sparse.cli.generate import generate
from hf_sparse.cli.info import info
from hf_sparse.cli.patch import patch
from hf_sparse.cli.push import push
from hf_sparse.cli.report import report
from hf_sparse.cli.serve import serve
from hf_sparse.cli.threads import wait_briefly
from hf_sparse.cli.unpatch import unpatch
from hf_sparse.environment import launched_processes

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold a token
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run `hf-sparse`."""
    wait_briefly(os.environ)
    app(prog_name="hf-sparse")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-sparse {version_of('hf-sparse')}")
        raise typer.Exit()


@app.callback()
def check_processes(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Patch a pretrained transformer with learned sparse attention, train what is small, push it."""
    verb = context.invoked_subcommand
    if verb != "finetune" and (count := launched_processes()) > 1:
        raise ValueError(
            f"{count} processes were launched, each of which would do all of `hf-sparse {verb}`: run it without a "
            "launcher, `hf-sparse finetune` alone shares its work"
        )


for verb in (patch, finetune, divide, unpatch):
    app.command()(verb)
app.command("eval")(evaluate)
for verb in (report, info, generate, chat, push, export):
    app.command()(verb)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(demo)
