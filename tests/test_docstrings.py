"""Every docstring says what its object does: the first line begins with a verb and its object."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: All first words that docstrings may have. A new verb is one line here; a noun, a question word or an article is none.
VERBS = frozenset(
    """
    Add Allocate Answer Apply Ask Attach Attend Average Bound Bring Build Call Carry Change Check Choose Clip Code
    Collect Compare Compile Complete Compute Configure Continue Copy Count Create Cut Decide Define Describe Divide
    Do Draw Embed Estimate Evaluate Expand Fill Find Finish Fit Fold Forget Gather Generate Give Group Hash Hide
    Hold Ignore Import Insert Join Keep Launch Learn Leave Let List Load Look Make Map Mark Measure Merge Move
    Multiply Name Normalise Note Observe Open Pack Patch Place Play Predict Prepare Print Project Publish Put Raise
    Rank Reach Read Recompute Record Redact Refuse Register Remove Render Replace Report Return Round Run Sample
    Save Say Scan Score Select Serve Set Shorten Show Solve Sort Spare Spend Split State Store Strip Subtract Sum
    Surround Switch Take Tell Tokenise Track Train Turn Undo Unfold Unite Wait Walk Warn Write Yield
    """.split()  # noqa: SIM905 (a list of strings would be one line for each verb)
)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the first line of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text.partition("\n")[0]


def begins_with_verb(line: str) -> bool:
    """Tell whether a line begins with one of `VERBS`, and says what it is done to."""
    first, _, rest = line.partition(" ")
    return first.rstrip(",") in VERBS and bool(rest.strip())


@pytest.mark.parametrize("folder", ["hf_sparse", "patches", "finetune"])
def test_first_line_begins_with_a_verb(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in paths
        for number, line in docstrings(path)
        if not begins_with_verb(line)
    ]
    assert not wrong, "expected a verb of VERBS and its object, got\n" + "\n".join(wrong)


def test_fragments_are_found() -> None:
    good = "Return the gates.", "Measure, train and push an adapter."
    bad = (
        "The gates of the keys.",
        "Whether a key is kept.",
        "What a key receives.",
        "Of the queries.",
        "`[B, H]`: the gates.",
        "return the gates.",
        "Returns the gates.",
        "Gates of the keys.",
        "Return",
        "",
    )
    assert all(map(begins_with_verb, good))
    assert not any(map(begins_with_verb, bad))
