"""Tables: every model family crossed with every behaviour, for every method, and the largest difference measured.

A test asks for `subject` (a family and a method, with models) and `measure` (checks a result and notes it for the
table). Its name is the name of its column; its file and the method are one table. A family without a patch and a method
without an entry in `tiny_methods.py` fail here, nothing is skipped: what a method refuses is a cell, and its reason is
printed below the table.

Without `--full` a behaviour takes every family and every method once (`tests/tiers.py`). The kin of other families
(`tests/families.py`) then have a cell only in the behaviours that their file in `patches/` can break, which are marked
`every_family`: dense within the budget, a padded prefill with steps after it, packed texts, gradients, and the base as
it was after detaching.
"""

import contextlib
import importlib.util
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse import patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.patches import sparse_layers

LENGTHS = (71, 40, 56)
BOUND = 1e-5
_PROPERTY = "conformance"


def _load(path: Path) -> Any:
    """Import a file by path, once: the tests are no package, so that they also run against an installed wheel."""
    name = f"hf_sparse_tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def _families() -> dict[str, Any]:
    return _load(Path(__file__).parents[1] / "families.py").FAMILIES


def _methods() -> dict[str, Any]:
    return _load(Path(__file__).parent / "tiny_methods.py").METHODS


class Subject:
    """Hold a family's tiny model, unpatched (`base`) and patched with a method (`sparse`), and what this must equal
    where it attends to all keys (`dense`). They are shared: a test that changes one uses `make` or `fresh`."""

    def __init__(self, name: str, family: Any, method: Any) -> None:
        self.name, self.family, self.method, self.causal = name, family, method, family.causal

    def make(self, **overrides: Any) -> PreTrainedModel:
        """The base model, or another class of the family with `model=`; the same weights every time."""
        model = self.family.make(**overrides)
        if model.can_generate():
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        return model

    def fresh(self, seed: int = 0, model: PreTrainedModel | None = None, **config: Any) -> PreTrainedModel:
        """A patched model; the same weights for the same arguments."""
        model = self.make() if model is None else model
        model = patch(model, self.method.config(model, **config))
        self.randomise(model, seed=seed)
        return model

    def randomise(self, model: torch.nn.Module, adapter: str = "default", seed: int = 0) -> None:
        """Give every layer and head random parameters of their own, apart enough for the choice to matter.

        What is called the same gets the same values, whatever else the configuration has.
        """
        with torch.no_grad():
            for layer in sparse_layers(model):
                for name, tensor in self.method.learned(layer)[adapter].state_dict(keep_vars=True).items():
                    start = zlib.crc32(f"{seed} {layer.layer} {name}".encode())
                    self.method.randomise(name, tensor, torch.Generator().manual_seed(start))

    @cached_property
    def base(self) -> PreTrainedModel:
        return self.make()

    @cached_property
    def sparse(self) -> PreTrainedModel:
        return self.fresh()

    @cached_property
    def dense(self) -> PreTrainedModel:
        return self.method.dense(self)

    @property
    def local_layers(self) -> bool:
        """Whether some layers of the model attend to a sliding window of their own and stay as they are."""
        return bool(self.family.local)

    @cached_property
    def last_layer(self) -> int:
        """The last layer that a patch does not leave alone."""
        return sparse_layers(self.sparse)[-1].layer

    @cached_property
    def ids(self) -> Tensor:
        """`[3, 71]` random tokens, none of them special."""
        return torch.randint(4, 64, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))

    def padded(self, side: str) -> tuple[Tensor, Tensor]:
        """`ids` and a mask with rows of `LENGTHS` real tokens, padded on one side."""
        columns, lengths = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
        mask = columns >= max(LENGTHS) - lengths if side == "left" else columns < lengths
        pad = getattr(self.base.config, "pad_token_id", None) or 0
        return self.ids.masked_fill(~mask, pad), mask.long()

    @torch.no_grad()
    def logits(self, model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """One forward over everything; logits, or hidden states of a model without a head."""
        options: dict[str, Any] = {"use_cache": False} if self.causal else {}
        mask = torch.ones_like(ids) if mask is None else mask
        output = model(ids, attention_mask=mask, position_ids=positions(mask), **options)
        return output.logits if "logits" in output else output.last_hidden_state

    @torch.no_grad()
    def in_chunks(
        self, model: Any, ids: Tensor, chunks: Sequence[int], mask: Tensor | None = None, cache: Any = None
    ) -> tuple[Tensor, Any]:
        """Logits of all positions computed with a cache, so many tokens at a time; and the cache."""
        assert sum(chunks) == ids.shape[1]
        mask = torch.ones_like(ids) if mask is None else mask
        parts = []
        for end, length in zip(torch.tensor(chunks).cumsum(0).tolist(), chunks, strict=True):
            new = slice(end - length, end)
            output = model(
                ids[:, new],
                attention_mask=mask[:, :end],
                position_ids=positions(mask)[:, new],
                **with_cache(cache),
                use_cache=True,
            )
            cache = cache_of(output)
            parts.append(output.logits)
        return torch.cat(parts, 1), cache


def positions(mask: Tensor) -> Tensor:
    """`position_ids` as `generate` makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Measure:
    """Checks results and notes what the table shows."""

    def __init__(self, note: dict[str, Any]) -> None:
        self.note = note

    def close(self, actual: Tensor, expected: Tensor, bound: float = BOUND) -> None:
        """The largest absolute difference is within the bound (and not NaN)."""
        difference = (actual.double() - expected.double()).abs().max().item()
        # `not <=`, so that a NaN stays in the table and fails
        self.note["largest"] = max(self.note["largest"] or 0.0, difference) if difference == difference else difference
        assert difference <= bound, f"largest difference {difference:.3g}, bound {bound:g}"

    def equal(self, actual: Tensor, expected: Tensor) -> None:
        """Bit for bit the same."""
        self.close(actual, expected, bound=0.0)

    def apart(self, actual: Tensor, expected: Tensor, least: float = 0.05) -> None:
        """Clearly different: what is compared elsewhere is worth comparing. Not a deviation, noted by itself."""
        difference = (actual - expected).abs().max().item()
        self.note["apart"] = min(self.note.get("apart", difference), difference)
        assert difference >= least, f"largest difference {difference:.3g}, expected at least {least:g}"

    @contextlib.contextmanager
    def refused(self, error: type[Exception] | tuple[type[Exception], ...], match: str) -> Iterator[None]:
        """One clear error instead of a wrong result."""
        with pytest.raises(error, match=match) as raised:
            yield
        self.note.setdefault("refused", " ".join(f"{type(raised.value).__name__}: {raised.value}".split()))


_SUBJECTS: dict[tuple[str, str], Subject] = {}


@pytest.fixture
def measure(request: pytest.FixtureRequest, family: str, method: str) -> Measure:
    node: Any = request.node
    column = node.originalname.removeprefix("test_").replace("_", " ")
    note = {
        "band": node.path.stem.removeprefix("test_").replace("_", " "),
        "family": family,
        "method": method,
        "column": column,
        "order": node.function.__code__.co_firstlineno,
        "largest": None,
    }
    node.user_properties.append((_PROPERTY, note))
    return Measure(note)


@pytest.fixture
def subject(measure: Measure, family: str, method: str) -> Subject:
    # After `measure`, so that a family whose model cannot even be made has its cells in the table.
    if (family, method) not in _SUBJECTS:
        _SUBJECTS[family, method] = Subject(family, _families()[family], _methods()[method])
    return _SUBJECTS[family, method]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family` and `method` run over all there are; a file takes some families: `KIND = "causal"` or `"encoder"`."""
    if "family" in metafunc.fixturenames:
        kind = getattr(metafunc.module, "KIND", None)
        takes_kin = metafunc.definition.get_closest_marker("every_family") is not None
        chosen = [
            pytest.param(name, marks=pytest.mark.full if family.kin and not takes_kin else ())
            for name, family in _families().items()
            if kind in (None, "causal" if family.causal else "encoder")
        ]
        metafunc.parametrize("family", chosen)
        metafunc.parametrize("method", list(_methods()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for group in ("passed", "failed", "error") for report in terminalreporter.stats.get(group, [])]
    notes = [
        (report.failed, note)
        for report in reports
        for name, note in getattr(report, "user_properties", [])
        if name == _PROPERTY
    ]
    for method in _methods():
        for band in sorted({note["band"] for _, note in notes if note["method"] == method}):
            chosen = [(failed, note) for failed, note in notes if (note["method"], note["band"]) == (method, band)]
            terminalreporter.section(f"conformance of {method}: {band}")
            for line in (*_table(band, chosen), *_reasons(chosen)):
                terminalreporter.write_line(line)


def _table(band: str, notes: list[tuple[bool, dict[str, Any]]]) -> Iterator[str]:
    """Lay out one table: a row per family, a column per behaviour."""
    columns: dict[tuple[int, str], dict[str, str]] = {}
    for failed, note in notes:
        column = columns.setdefault((note["order"], note["column"]), {})
        column[note["family"]] = "FAILED" if failed else column.get(note["family"]) or _cell(note)
    rows = [name for name in _families() if any(name in column for column in columns.values())]
    table = [[band, *(column for _, column in sorted(columns))]]
    table += [[row, *(columns[key].get(row, "") for key in sorted(columns))] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * width for width in widths])
    for line in table:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"


def _reasons(notes: list[tuple[bool, dict[str, Any]]]) -> list[str]:
    """Say what the refusals of one table are: a line for each behaviour."""
    reasons = {}
    for _, note in notes:
        if "refused" in note:
            reasons.setdefault((note["order"], note["column"]), note["refused"])
    return [f"refused, {column}: {reasons[order, column]}" for order, column in sorted(reasons)]


def _cell(note: dict[str, Any]) -> str:
    """What a passed test shows: the largest difference, "exact" for none, "refused", or how far apart."""
    parts = []
    if note["largest"] is not None:
        parts.append(f"{note['largest']:.1e}" if note["largest"] else "exact")
    if "apart" in note:
        parts.append(f"{note['apart']:.1f} apart")
    if "refused" in note:
        parts.append("refused")
    return ", ".join(parts)


@pytest.fixture(name="methods")
def _tiny_methods() -> dict[str, Any]:
    """All entries of `tiny_methods.py`, by name."""
    return _methods()
