"""Turn what can go wrong in ordinary use into one line and an exit code."""

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup


class OneLineErrors(TyperGroup):
    """Show an expected error as one line and exit with code 1; with `--debug` show the traceback."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params["debug"]:
            with _without_secrets():
                return super().invoke(ctx)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # for those who program against the libraries
                return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted; files are as they were")
            raise typer.Exit(130) from None
        except Exception as error:
            if not is_expected(error):
                _scrub(error)
                raise
            complain(f"[red]error:[/red] {escape(message_of(error))}")
            raise typer.Exit(1) from None


def is_expected(error: Exception) -> bool:
    """Tell whether the message alone helps: wrong input, or files, networks and memory that fail."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return False  # typer's business: whoever reads the output has stopped
    if isinstance(error, ValueError | OSError):
        return True
    if "hf_sparse.workflow" not in sys.modules:
        return False  # nothing of ours has run: typer's own exits and usage errors
    from huggingface_hub.errors import EntryNotFoundError, HTTPError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    from hf_sparse.errors import HfSparseError

    if "DefaultCPUAllocator" in str(error):  # torch has no class for memory of the CPU
        return True
    # safetensors raises its own kind where the disk is full.
    kinds = HfSparseError | HTTPError | EntryNotFoundError | OutOfMemoryError | MemoryError | SafetensorError
    return isinstance(error, kinds)


def message_of(error: Exception) -> str:
    """Return the message of an error in one line, without access tokens; its kind where it has no message."""
    from hf_sparse.access_tokens import one_line

    return one_line(error) or type(error).__name__


def complain(message: str) -> None:
    """Print a message, which may have rich's markup, on stderr."""
    Console(stderr=True).print(message, soft_wrap=True, highlight=False)


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Take access tokens out of an exception on its way to a printed traceback."""
    try:
        yield
    except Exception as error:
        _scrub(error)
        raise


def _scrub(error: Exception) -> None:
    """Take access tokens out of an exception that is printed whole; where nothing of ours has run there are none."""
    if "hf_sparse.access_tokens" in sys.modules:
        from hf_sparse.access_tokens import scrub

        scrub(error)
