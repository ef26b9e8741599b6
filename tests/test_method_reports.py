"""Every registered method has what the layers above look up."""

import pytest

from hf_sparse.adapters.method_report import MethodReport, all_reports
from hf_sparse.core.registry import registered_methods
from hf_sparse.finetune.stages import Training


@pytest.mark.parametrize("name", registered_methods())
def test_every_method_can_be_trained_and_shown(name):
    method = registered_methods()[name]
    report = method.report()
    assert issubclass(method.training(), Training) and isinstance(report, MethodReport)
    assert report.name == method.evaluation().name == method.name


def test_every_template_is_there():
    for report in all_reports():
        assert sorted(path.name for path in report.templates.glob("*.jinja")) == ["card.md.jinja", "report.html.jinja"]


def test_methods_share_no_files():
    """Check that what one method removes or replaces in a folder is never another's."""
    files = [name for report in all_reports() for name in (report.figure, report.details_file, *report.pictures)]
    assert len(files) == len(set(files)) and "training" not in files


def test_every_objective_of_a_method_has_a_sentence():
    for method in registered_methods().values():
        assert set(method.training().objectives) <= {"distill", "lm", *method.report().objectives}
