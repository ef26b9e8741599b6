"""What a method tells the layers above of its measurements, and the pictures that it draws of them."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse.core.registry import method_of, registered_methods
from hf_sparse.figures.style import DPI

Json = dict[str, Any]


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


@dataclass(frozen=True)
class Results:
    """The measurements of one method: what is measured, of which adapter it is, and how card and report show it.

    Attributes:
        name: of the method, and a tag of the card.
        templates: the folder of card.md.jinja and report.html.jinja.
        tags: of the card, besides those that all have.
        check: raises `DataError` for an eval.json that is not of the settings of a configuration.
        figure: file name of the picture of the card.
        draw_figure: draws it of eval.json, and of finetune.json where there is one, at a path.
        card: what its template shows besides what all show, of a configuration, eval.json (`None`: not measured), and
            whether the model attends in both directions.
        aside: file name of what nothing but the report shows, measured of a text.
        describe: measures that, of a model, its tokenizer, chunks `[N, T]` and `text_name`.
        pictures: names of the pictures of the report; `*` stands for anything.
        draw: draws them, of eval.json and of what `describe` returned, where there is some.
        report: what its template shows besides what all show, of the same two and of the pictures.
    """

    name: str
    templates: Path
    tags: tuple[str, ...]
    check: Callable[[Json, Any], None]
    figure: str
    draw_figure: Callable[[Json, Json | None, Path], None]
    card: Callable[[Any, Json | None, bool], Json]
    aside: str
    describe: Callable[..., Json]
    pictures: tuple[str, ...]
    draw: Callable[[Pictures, Json, Json | None], None]
    report: Callable[[Json, Json | None, Sequence[Picture]], Json]


def results_of(config: Any) -> Results:
    """Return the results of adapters with a configuration like this."""
    return method_of(config).report()


def all_results() -> list[Results]:
    """Return the results of every registered method."""
    return [method.report() for method in registered_methods().values()]
