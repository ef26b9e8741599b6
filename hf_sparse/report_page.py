"""What the reports of all methods share: pictures, and a page made of a template."""

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse.errors import DataError
from hf_sparse.figures.style import DPI

REPORT, PICTURES = "report.html", "figures"

_NAMES = (
    *("quality", "budgets", "divergence", "positions", "heads", "tokens", "training"),
    *("pareto", "covered", "graphs"),
)


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        name: of its file too, without the suffix.
        caption: what it shows, in words.
        png: its bytes.
    """

    name: str
    caption: str
    png: bytes

    @property
    def data(self) -> str:
        """Its bytes as text."""
        return base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Width in CSS pixels, of which an inch has 96: letters have the same size in all pictures."""
        return int.from_bytes(self.png[16:20]) * 96 // DPI


@dataclass(frozen=True)
class Pictures:
    """Pictures that are drawn into a folder.

    Attributes:
        folder: holds them.
        drawn: those that are there, in the order of the page.
    """

    folder: Path
    drawn: list[Picture]

    def add(self, name: str, caption: str, draw: Any, *content: Any, **options: Any) -> None:
        """Draw one: `draw(*content, path, **options)` writes the PNG."""
        path = self.folder / f"{name}.png"
        draw(*content, path, **options)
        self.drawn.append(Picture(name, caption, path.read_bytes()))


def remove_report(folder: Path) -> None:
    """Remove the report of an adapter that is no more: its page and its pictures, and nothing else."""
    (folder / REPORT).unlink(missing_ok=True)
    remove_pictures(folder)


def remove_pictures(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove the pictures of an earlier report.

    Args:
        folder: of the adapter.
        keep: names of pictures that are true still.
    """
    for path in (folder / PICTURES).glob("*.png"):
        if path.stem not in keep and (path.stem in _NAMES or path.stem.startswith("task-")):
            path.unlink()
    if (folder / PICTURES).is_dir() and not any((folder / PICTURES).iterdir()):
        (folder / PICTURES).rmdir()


def render_page(template: str, sources: str, **content: Any) -> str:
    """The page of a template beside this file.

    Args:
        sources: the files that the content is from, for the message.
        **content: what the template shows.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.globals.update(listed=_listed)
    try:
        return environment.get_template(template).render(**content)
    except (UndefinedError, LookupError, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{sources} is not what hf-sparse writes: {error!r}") from error


def _listed(content: Mapping[str, Any]) -> str:
    """`{"cpus": 4, "torch_threads": 1}` as `cpus 4, torch threads 1`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in content.items())
