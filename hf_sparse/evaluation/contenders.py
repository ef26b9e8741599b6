"""Measure the models of a method by comparing dense attention with it, unless the method says otherwise."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_sparse.evaluation.base import DENSE, AbstractEvaluation, Request
from hf_sparse.evaluation.comparison import compare_contenders
from hf_sparse.evaluation.show import comparison_table, sweep_table
from hf_sparse.evaluation.switching import layers_to_measure, switched

if TYPE_CHECKING:
    from rich.table import Table


class Evaluation(AbstractEvaluation):
    """Describe how the models of one method are measured.

    What is here compares dense attention with the method as it was trained. A subclass adds baselines, budgets and
    options, or measures something else.
    """

    def attending(self, model: nn.Module, name: str) -> AbstractContextManager[None]:
        """Switch sparse attention on or, for `"dense"`, off within a `with` block."""
        return switched(layers_to_measure(model), name != DENSE)

    def subject(self, model: nn.Module) -> dict[str, Any]:
        """Return the method, the base model and, if the method has one, the budget."""
        subject = {"method": self.name, "base_model": base_model_of(model)}
        budget = self.budget(model)
        return subject if budget is None else {**subject, "budget": budget.sizes}

    def measure(self, model: nn.Module, request: Request) -> dict[str, Any]:
        """Return the quality of all contenders, and bytes and speed of dense and sparse attention."""
        return compare_contenders(self, model, request)

    def tables(self, result: dict[str, Any]) -> list["Table"]:
        """Return a table of all contenders, and one of the further budgets if there are any."""
        budget = result.get("budget", {})
        first = comparison_table(result, ", ".join(f"{name} {size}" for name, size in budget.items()) or self.name)
        return [first, *([sweep_table(result)] if "sweep" in result else [])]


def base_model_of(model: Any) -> str:
    """Return the name of the base model of a patched one."""
    name: str = layers_to_measure(model)[0].config.base_model_name_or_path or model.config.name_or_path
    return name
