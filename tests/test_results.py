"""Every registered method has what the layers above look up."""

import pytest

from hf_sparse.adapters.results import all_results
from hf_sparse.core.registry import registered_methods


@pytest.mark.parametrize("name", registered_methods())
def test_every_method_can_be_trained_and_shown(name):
    method = registered_methods()[name]
    assert method.training().label == method.layer.label and method.report().name == method.name


def test_every_template_is_there():
    for results in all_results():
        assert sorted(path.name for path in results.templates.glob("*.jinja")) == ["card.md.jinja", "report.html.jinja"]


def test_methods_share_no_files():
    """What one method removes or replaces in a folder is never another's."""
    files = [name for results in all_results() for name in (results.figure, results.aside, *results.pictures)]
    assert len(files) == len(set(files)) and "training" not in files
