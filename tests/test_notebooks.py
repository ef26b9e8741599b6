"""Run the notebooks cell by cell, as a kernel would, and keep their outputs out of the repository."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def code(path):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code(path))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.full if path.stem == "sparsefinder_graphs" else ()) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    if "sentence_transformers" in path.read_text("utf-8"):
        pytest.importorskip("sentence_transformers", reason="needs the extra `composition`: run `make composition`")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    exec(compile("\n".join("".join(cell["source"]) for cell in code(path)), str(path), "exec"), {})
