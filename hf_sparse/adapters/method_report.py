"""Describe what a method tells cards and reports of its measurements, and hold the pictures that it draws of them."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_sparse.core.config import FILLED_IN, SparseConfig
from hf_sparse.core.registry import method_of, registered_methods
from hf_sparse.core.settings import values_of
from hf_sparse.errors import DataError
from hf_sparse.figures.contenders import contenders_figure
from hf_sparse.figures.style import BLUE, DPI, Look, Looks
from hf_sparse.metrics import metric_of

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


class MethodReport:
    """Show the measurements of one method on the card and the report of its adapters.

    What is here shows what the class `Evaluation` of hf_sparse.evaluation measures unless a method changes it: the
    metric of each contender, memory and speed. A subclass has the name of its method; it may have templates and
    pictures of its own.

    `evaluation` is the content of eval.json everywhere, `training` that of finetune.json, and `details` what
    `describe` returned.

    Attributes:
        name: of the method, and a tag of the card.
        templates: the folder of card.md.jinja and report.html.jinja.
        figure: file name of the picture of the card.
        details_file: name of the JSON file for what only the report shows; `None` for a method without.
        pictures: names of the pictures of the report, without suffix; `*` stands for anything.
        looks: of the contenders in the pictures that are drawn here.
        objectives: the sentence of the card on each training objective that only this method has.
        stages: title and unit of the loss of each training stage that only this method has, for its curve.
    """

    name: ClassVar[str]
    templates: ClassVar[Path] = Path(__file__).parent
    figure: ClassVar[str] = "contenders.png"
    details_file: ClassVar[str | None] = None
    pictures: ClassVar[tuple[str, ...]] = ("contenders",)
    looks: ClassVar[Looks] = Looks({"learned": Look("learned", BLUE, "o")}, learned="learned")
    objectives: ClassVar[Mapping[str, str]] = {}
    stages: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def check(self, evaluation: Json, config: SparseConfig) -> None:
        """Check that an eval.json was measured with the settings of a configuration.

        Raises:
            DataError: it is one of another method, or of other settings.
        """
        if evaluation.get("method") != self.name:
            raise DataError(
                f"eval.json is of the method {evaluation.get('method')!r}, but the adapter is of {self.name!r}"
            )

    def tags(self, both_ways: bool) -> Sequence[str]:
        """Return tags of the card besides those that all cards have; `both_ways` is true for an encoder."""
        return ()

    def card(self, config: SparseConfig, evaluation: Json | None, both_ways: bool) -> Json:
        """Return what the template of the card shows besides what all cards show.

        Args:
            config: of the adapter.
            evaluation: `None` where nothing was measured.
            both_ways: whether the model attends to later tokens too, as an encoder does.
        """
        settings = {name: value for name, value in values_of(config).items() if name not in FILLED_IN}
        rows = _rows(self.looks, evaluation) if evaluation else {}
        return {"method": self.name, "module": module_of(config), "adapter_settings": settings, "rows": rows}

    def draw_figure(self, evaluation: Json, training: Json | None, path: Path) -> None:
        """Draw the picture of the card."""
        contenders_figure(evaluation, training, path, self.looks, stages=self.stages)

    def describe(self, model: nn.Module, tokenizer: Any, chunks: Tensor, text_name: str) -> Json:
        """Measure of chunks `[N, T]` of a text what only the report shows.

        Raises:
            DataError: the reports of this method show no text.
        """
        raise DataError(f"a report on a {self.name} adapter shows no text: leave --text (the argument `text`) out")

    def draw(self, pictures: Pictures, config: SparseConfig, evaluation: Json, details: Json | None) -> None:
        """Draw the pictures of the report for which there are measurements, the training's apart."""
        caption = "dense attention beside what was compared with it"
        pictures.add("contenders", caption, contenders_figure, evaluation, None, looks=self.looks)

    def report(self, evaluation: Json, details: Json | None, drawn: Sequence[Picture]) -> Json:
        """Return what the template of the report shows besides what all reports show."""
        return {"method": self.name, "rows": _rows(self.looks, evaluation)}


def _rows(looks: Looks, evaluation: Json) -> dict[str, str]:
    """Return the label of each contender that was measured, by its name, in the order of tables."""
    values = evaluation[metric_of(evaluation).key]
    names = [*(["dense"] if "dense" in values else []), *looks.ordered(values)]
    return {name: looks.label(name) for name in names}


def module_of(config: SparseConfig) -> str | None:
    """Return the module that registers the method of a configuration, `None` where `import hf_sparse` does."""
    module = type(config).__module__
    if module.startswith("hf_sparse."):
        return None
    package = module.rpartition(".")[0]
    return f"{package}.method" if package else module


def report_of(config: SparseConfig) -> MethodReport:
    """Return the report of the method that a configuration is for."""
    report: MethodReport = method_of(config).report()
    return report


def all_reports() -> list[MethodReport]:
    """Return the report of every registered method."""
    return [method.report() for method in registered_methods().values()]
