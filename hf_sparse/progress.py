"""Show how far work is, on stderr: a bar for people at a terminal, a plain line every few steps in a file or a pipe."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_LINES = 20  # of one piece of work, at most


def is_terminal() -> bool:
    """Tell whether stderr is a terminal, where a bar can be drawn over itself."""
    return sys.stderr.isatty()


class ProgressLines:
    """Print a line every few steps; has the methods of `tqdm` that the training loop uses.

    Args:
        total: number of steps.
        label: what is done.
        initial: steps that were done before.
    """

    def __init__(self, total: int, label: str, initial: int = 0) -> None:
        self.total, self.label, self.done = total, label, initial
        self.every = max(1, -(-total // _LINES))

    def update(self) -> None:
        """Count a step."""
        self.done += 1

    def set_postfix(self, **notes: Any) -> None:
        """Print a line, if this step has one, with notes on it."""
        if self.done % self.every == 0 or self.done == self.total:
            noted = "".join(f", {name} {value}" for name, value in notes.items())
            print(f"{self.label}: {self.done} of {self.total}{noted}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the lines as they are."""


def tracked(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield items, and show how many of them are done."""
    if is_terminal():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, label, console=Console(stderr=True), transient=True)
        return
    lines = ProgressLines(len(items), label)
    for item in items:
        yield item
        lines.update()
        lines.set_postfix()
