"""Describe what a method tells cards and reports of its measurements, and hold the pictures that it draws of them."""

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_sparse.core.config import SparseConfig
from hf_sparse.core.registry import method_of, registered_methods
from hf_sparse.figures.style import DPI

Json = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """Hold a picture of the report.

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
        """Return its bytes as base64 text."""
        return base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Return its width in CSS pixels, of which an inch has 96: letters have the same size in all pictures."""
        return int.from_bytes(self.png[16:20]) * 96 // DPI


@dataclass(frozen=True)
class Pictures:
    """Collect the pictures that are drawn into a folder.

    Attributes:
        folder: holds their files.
        drawn: the pictures so far, in the order of the page.
    """

    folder: Path
    drawn: list[Picture]

    def add(self, name: str, caption: str, draw: Any, *content: Any, **options: Any) -> None:
        """Draw one picture: `draw(*content, path, **options)` writes the PNG."""
        path = self.folder / f"{name}.png"
        draw(*content, path, **options)
        self.drawn.append(Picture(name, caption, path.read_bytes()))


class MethodReport(ABC):
    """Show the measurements of one method on the card and the report of its adapters. Each method has a subclass.

    `evaluation` is the content of eval.json everywhere, `training` that of finetune.json, and `details` what
    `describe` returned.

    Attributes:
        name: of the method, and a tag of the card.
        templates: the folder of card.md.jinja and report.html.jinja.
        figure: file name of the picture of the card.
        details_file: name of the JSON file for what only the report shows.
        pictures: names of the pictures of the report, without suffix; `*` stands for anything.
        objectives: the sentence of the card on each training objective that only this method has.
        stages: title and unit of the loss of each training stage that only this method has, for its curve.
    """

    name: ClassVar[str]
    templates: ClassVar[Path]
    figure: ClassVar[str]
    details_file: ClassVar[str]
    pictures: ClassVar[tuple[str, ...]]
    objectives: ClassVar[Mapping[str, str]] = {}
    stages: ClassVar[Mapping[str, tuple[str, str]]] = {}

    @abstractmethod
    def check(self, evaluation: Json, config: SparseConfig) -> None:
        """Check that an eval.json was measured with the settings of a configuration.

        Raises:
            DataError: it is one of another method, or of other settings.
        """

    def tags(self, both_ways: bool) -> Sequence[str]:
        """Return tags of the card besides those that all cards have; `both_ways` is true for an encoder."""
        return ()

    @abstractmethod
    def card(self, config: SparseConfig, evaluation: Json | None, both_ways: bool) -> Json:
        """Return what the template of the card shows besides what all cards show.

        Args:
            config: of the adapter.
            evaluation: `None` where nothing was measured.
            both_ways: whether the model attends to later tokens too, as an encoder does.
        """

    @abstractmethod
    def draw_figure(self, evaluation: Json, training: Json | None, path: Path) -> None:
        """Draw the picture of the card."""

    @abstractmethod
    def describe(self, model: nn.Module, tokenizer: Any, chunks: Tensor, text_name: str) -> Json:
        """Measure of chunks `[N, T]` of a text what only the report shows."""

    @abstractmethod
    def draw(self, pictures: Pictures, evaluation: Json, details: Json | None) -> None:
        """Draw the pictures of the report for which there are measurements, the training's apart."""

    @abstractmethod
    def report(self, evaluation: Json, details: Json | None, drawn: Sequence[Picture]) -> Json:
        """Return what the template of the report shows besides what all reports show."""


def report_of(config: SparseConfig) -> MethodReport:
    """Return the report of the method that a configuration is for."""
    report: MethodReport = method_of(config).report()
    return report


def all_reports() -> list[MethodReport]:
    """Return the report of every registered method."""
    return [method.report() for method in registered_methods().values()]
