"""Check that the tables of speed in the documents are what `benchmarks/speed_tables` makes of the JSON."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/speed.md", "README.md")


@pytest.fixture(scope="module")
def speed_tables() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("speed_tables")


@pytest.fixture(scope="module")
def tables(speed_tables) -> dict[str, str]:
    return speed_tables.all_tables()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_number_is_that_of_the_json(document, speed_tables, tables):
    text = (ROOT / document).read_text("utf-8")
    assert speed_tables.fill(text, tables) == text


def test_every_table_has_a_place(tables):
    text = "".join((ROOT / document).read_text("utf-8") for document in DOCUMENTS)
    places = re.findall(r"<!-- table: (.*) -->", text)
    assert sorted(places) == sorted(tables)  # each once


def test_fill_replaces_what_is_marked_and_nothing_else(speed_tables):
    text = "before\n<!-- table: a -->\nold\n<!-- end -->\n<!-- table: a-b -->\nkept\n<!-- end -->\n"
    assert speed_tables.fill(text, {"a": "new\n"}) == text.replace("old", "new")
    with pytest.raises(KeyError, match="'a'"):
        speed_tables.fill(text, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [("busy cpu", "two tables are called 'busy cpu'"), ("GPUs", "lower case letters, digits and spaces, got 'GPUs'")],
)
def test_names_that_no_table_can_have_are_refused(speed_tables, name, message):
    with pytest.raises(ValueError, match=message):
        speed_tables.registry.speed_table(name, "busy-cpu")
