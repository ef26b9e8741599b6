"""One table: every model family crossed with every behaviour, and the largest difference that was measured.

A test asks for `subject` (a family with its models) and `measure` (checks a result and notes it for the table). Its
name is the name of its column, its file is one band of the table. A family without a patch fails here, it is never
skipped.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.patches import sparse_layers

# Far fewer slots (13) than tokens, so that every layer must choose and every choice can be wrong.
BUDGET = {"k": 5, "window": 6, "sinks": 2}
LENGTHS = (71, 40, 56)
BOUND = 1e-5
_PROPERTY = "conformance"


def _families() -> dict[str, Any]:
    name = "hf_sparse_tests_families"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "families.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name].FAMILIES


def randomise(model: torch.nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Random scorers of their own for every layer and head, apart enough for the choice to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for method in sparse_layers(model):
            for parameter in method.sparsek_scorer[adapter].parameters():
                parameter.normal_(std=0.3, generator=generator)


class Subject:
    """A family's tiny model: dense (`base`) and patched (`sparse`). Both are shared: a test that changes one uses
    `make` or `fresh`."""

    def __init__(self, name: str, family: Any) -> None:
        self.name, self.family, self.causal = name, family, family.causal

    def make(self, **overrides: Any) -> PreTrainedModel:
        """The base model, or another class of the family with `model=`; the same weights every time."""
        model = self.family.make(**overrides)
        if model.can_generate():
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        return model

    def fresh(self, seed: int = 0, model: PreTrainedModel | None = None, **config: Any) -> PreTrainedModel:
        """A patched model; the same weights for the same arguments."""
        model = patch(self.make() if model is None else model, SparseKConfig(**{**BUDGET, **config}))
        randomise(model, seed=seed)
        return model

    @cached_property
    def base(self) -> PreTrainedModel:
        return self.make()

    @cached_property
    def sparse(self) -> PreTrainedModel:
        return self.fresh()

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
        with pytest.raises(error, match=match):
            yield
        self.note["refused"] = True


_SUBJECTS: dict[str, Subject] = {}


@pytest.fixture
def measure(request: pytest.FixtureRequest, family: str) -> Measure:
    node: Any = request.node
    column = node.originalname.removeprefix("test_").replace("_", " ")
    note = {
        "band": node.path.stem.removeprefix("test_").replace("_", " "),
        "family": family,
        "column": column,
        "order": node.function.__code__.co_firstlineno,
        "largest": None,
    }
    node.user_properties.append((_PROPERTY, note))
    return Measure(note)


@pytest.fixture
def subject(measure: Measure, family: str) -> Subject:
    # After `measure`, so that a family whose model cannot even be made has its cells in the table.
    if family not in _SUBJECTS:
        _SUBJECTS[family] = Subject(family, _families()[family])
    return _SUBJECTS[family]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family` runs over all families; a file narrows it with `KIND = "causal"` or `KIND = "encoder"`."""
    if "family" in metafunc.fixturenames:
        kind = getattr(metafunc.module, "KIND", None)
        wanted = [
            name for name, family in _families().items() if kind in (None, "causal" if family.causal else "encoder")
        ]
        metafunc.parametrize("family", wanted)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for group in ("passed", "failed", "error") for report in terminalreporter.stats.get(group, [])]
    cells: dict[str, dict[tuple[int, str], dict[str, str]]] = {}
    for report in reports:
        for name, note in getattr(report, "user_properties", []):
            if name != _PROPERTY:
                continue
            column = cells.setdefault(note["band"], {}).setdefault((note["order"], note["column"]), {})
            column[note["family"]] = "FAILED" if report.failed else column.get(note["family"]) or _cell(note)
    for band, columns in sorted(cells.items()):
        rows = [name for name in _families() if any(name in column for column in columns.values())]
        table = [[band, *(column for _, column in sorted(columns))]]
        table += [[row, *(columns[key].get(row, "") for key in sorted(columns))] for row in rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        table.insert(1, ["-" * width for width in widths])
        terminalreporter.section(f"conformance: {band}")
        for line in table:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            terminalreporter.write_line("| " + " | ".join(padded) + " |")


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


@pytest.fixture(name="randomise")
def _randomise() -> Any:
    """`randomise(model, adapter, seed)`."""
    return randomise
