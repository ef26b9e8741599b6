"""Progress on stderr: plain lines where it is no terminal, a bar where it is."""

import sys

import pytest

from hf_sparse.progress import ProgressLines, tracked


def test_a_file_gets_a_line_every_few_steps(capsys):
    lines = ProgressLines(100, "scorers, step", initial=40)
    for _ in range(60):
        lines.update()
        lines.set_postfix(loss="0.5", stage="distill")
    lines.close()
    written = capsys.readouterr().err.splitlines()
    assert written[0] == "scorers, step: 45 of 100, loss 0.5, stage distill"
    assert written[-1].startswith("scorers, step: 100 of 100") and len(written) == 12


@pytest.mark.parametrize("count", [1, 3, 41])
def test_items_come_as_they_are_and_the_last_has_a_line(capsys, count):
    assert list(tracked(list(range(count)), "chunks")) == list(range(count))
    written = capsys.readouterr().err.splitlines()
    assert written[-1] == f"chunks: {count} of {count}" and len(written) <= 20


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(tracked([1, 2], "chunks")) == [1, 2]
    assert "1 of 2" not in capsys.readouterr().err
