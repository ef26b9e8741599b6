"""Predict all keys."""

from typing import TYPE_CHECKING

from hf_sparse.methods.sparsefinder.predictors.base import AttentionInputs, Codes, Predictor

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters


class Full(Predictor):
    """Attend to all keys: nothing is predicted, and nothing is learned."""

    @property
    def prompt_edge(self) -> int:
        return 0

    def sees_all(self, queries: int, keys: int) -> bool:
        return True

    def graph(self, learned: "SparsefinderParameters", text: AttentionInputs, codes: Codes | None) -> None:
        return None
