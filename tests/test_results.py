"""Every registered method has what the layers above look up."""

from pathlib import Path

import hf_sparse
from hf_sparse.finetune.trainings import TRAININGS
from hf_sparse.methods import registered_methods
from hf_sparse.results import RESULTS


def test_every_method_can_be_trained_and_shown():
    assert TRAININGS.keys() == RESULTS.keys() == {method.attention for method in registered_methods().values()}


def test_every_template_is_there_and_used():
    pages = {
        page for results in RESULTS.values() for page in (f"card_{results.name}.md", f"report_{results.name}.html")
    }
    assert {path.stem for path in Path(hf_sparse.__file__).parent.glob("*.jinja")} == pages | {"report_parts.html"}


def test_methods_share_no_files():
    """What one method removes or replaces in a folder is never another's."""
    files = [name for results in RESULTS.values() for name in (results.figure, results.aside, *results.pictures)]
    assert len(files) == len(set(files)) and "training" not in files
