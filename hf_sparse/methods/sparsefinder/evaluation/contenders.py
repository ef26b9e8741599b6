"""Compare predicted graphs with full entmax, dense softmax, and other patterns of the same number of tiles."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from hf_sparse.errors import DataError
from hf_sparse.evaluation.base import DENSE, Request, check_names
from hf_sparse.evaluation.contenders import Evaluation, base_model_of
from hf_sparse.evaluation.switching import switched
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.evaluation.measure import measure_graphs
from hf_sparse.methods.sparsefinder.evaluation.operating_points import adapter_settings, predicting_layers
from hf_sparse.methods.sparsefinder.evaluation.patterns import CONTENDERS, FITTED, Patterns, attending
from hf_sparse.methods.sparsefinder.evaluation.show import graph_table
from hf_sparse.methods.sparsefinder.evaluation_settings import SparsefinderEvaluationSettings

if TYPE_CHECKING:
    from rich.table import Table

# Contenders that exist between tiles only, not between single tokens.
_OF_TILES = ("bound", "windows")


class SparsefinderEvaluation(Evaluation):
    """Measure graphs at several sparsities: the share of the gold graph that they cover, and the model's metric.

    Dense softmax and full entmax are always measured, and are no contenders. A checkpoint that was trained with entmax
    is compared with full entmax alone.
    """

    name = "sparsefinder"
    settings_type = SparsefinderEvaluationSettings
    chunks = 4  # each is read with all patterns at all sparsities

    def length(self, config: SparsefinderConfig) -> int:
        """Return the tokens that the sparsity of the settings is meant for."""
        return config.length

    def contenders(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the predicted graph and of the patterns that can be measured with these settings."""
        config = predicting_layers(model)[0].config
        left_out = set(_OF_TILES) if config.tile is None else set()
        left_out |= {"predicted"} if config.predictor == "full" else set()
        return tuple(name for name in CONTENDERS if name not in left_out)

    def generating(self, model: nn.Module) -> NoReturn:
        """Refuse tasks, which are compared at equal slots.

        Raises:
            DataError: always.
        """
        raise DataError(
            "tasks compare contenders at a number of KV slots, got a Sparsefinder adapter, which has none; measure text"
        )

    def check_contenders(self, model: nn.Module, names: Sequence[str]) -> None:
        """Raise `ValueError` for names that are unknown, or that the settings of the adapter leave out."""
        check_names(names, CONTENDERS)
        config = predicting_layers(model)[0].config
        for name in _OF_TILES:
            if config.tile is None and name in names:
                raise ValueError(
                    f"the contender {name!r} chooses tiles of keys: expected an adapter with tiles, got tile=None"
                )
        if config.predictor == "full" and "predicted" in names:
            raise ValueError("the predictor 'full' attends to all keys: there is no predicted graph to measure")

    def attending(self, model: nn.Module, name: str) -> AbstractContextManager[None]:
        """Let dense attention, the predicted graph or another pattern attend within a `with` block.

        Raises:
            ValueError: a pattern that is fitted to the very text that is measured, or dense attention of a checkpoint
                that was trained with entmax.
        """
        layers = predicting_layers(model)
        if name in FITTED:
            raise ValueError(
                f"{name!r} is fitted to the text that is measured: call hf_sparse.evaluation.evaluate, which does that"
            )
        if name == DENSE and layers[0].config.entmax_native is not None:
            raise ValueError(
                "this checkpoint was trained with entmax (entmax_native), and with softmax it is no model to compare "
                "with: expected a pattern, or a model with the predictor 'full', got 'dense'"
            )
        if name == DENSE:
            return switched(layers, False)
        return attending(layers, [Patterns(layer, seed=0).pattern(name) for layer in layers])

    def check(self, model: nn.Module, request: Request) -> None:
        """Check that a text is longer than a tile, and that the predictors were fitted.

        Raises:
            DataError: chunks that are too short.
            ValueError: a `stride`, or predictors that were not fitted.
        """
        if request.stride is not None:
            raise ValueError(
                "stride is no option of sparsefinder, whose graphs are measured on all tokens of a chunk: "
                f"expected None, got {request.stride}"
            )
        layers = predicting_layers(model)
        tile, length = layers[0].config.tile, request.tokens.shape[1]
        if length <= (tile or 1):
            raise DataError(f"nothing is left out: a text of {length} tokens is one tile of {tile}; use longer chunks")
        for layer in layers:
            layer.parameters_in_use.check_fitted()

    def subject(self, model: nn.Module) -> dict[str, Any]:
        """Return the method, the base model, and the settings that the adapter attends by."""
        layer = predicting_layers(model)[0]
        adapter = adapter_settings(layer.config)
        return {"method": self.name, "base_model": base_model_of(model), "adapter": adapter, "causal": layer.causal}

    def measure(self, model: nn.Module, request: Request) -> dict[str, Any]:
        """Return the measurements of graphs, see `measure_graphs`."""
        return measure_graphs(model, request)

    def tables(self, result: dict[str, Any]) -> list["Table"]:
        """Return the table of all graphs at all sparsities."""
        return [graph_table(result)]
