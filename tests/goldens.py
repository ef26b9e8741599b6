"""Whole texts that the package writes, kept under `tests/golden/` and compared as a whole.

`.venv/bin/pytest --write-golden` writes them anew where prose or a template was changed; the diff is then read and
committed. `tests/test_golden.py` fails for a file that no test names.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the files under tests/golden/ anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name, or write the file: `golden("card/lora.md", text)`."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("write_golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        assert path.exists(), f"there is no tests/golden/{name}: write it with pytest --write-golden"
        assert text == path.read_text("utf-8"), f"tests/golden/{name} differs: pytest --write-golden writes it anew"

    return compare
