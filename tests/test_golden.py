"""Every file under `tests/golden/` is one that a test compares with."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path.relative_to(TESTS / "golden").as_posix() for path in (TESTS / "golden").rglob("*.*"))


def test_no_golden_file_is_left_over():
    source = "".join(path.read_text("utf-8") for path in TESTS.rglob("test_*.py"))
    assert FILES and [name for name in FILES if f'"{name}"' not in source] == []


def test_goldens_know_no_machine():
    for name in FILES:
        text = (TESTS / "golden" / name).read_text("utf-8")
        for local in (str(Path.home()), str(TESTS.parent), "/tmp/"):
            assert local not in text, (name, local)


def test_a_text_that_differs_is_refused(golden, request):
    if request.config.getoption("write_golden"):
        pytest.skip("the files are being written")
    with pytest.raises(AssertionError, match="pytest --write-golden writes it anew"):
        golden(FILES[0], "another text")
    with pytest.raises(AssertionError, match=r"there is no tests/golden/nothing\.md"):
        golden("nothing.md", "")
