"""Define the interface of predictors, and their input."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.ops.tiles import Tiles

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters

Codes = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionInputs:
    """Hold the arguments of entmax attention: texts of a batch, each beginning at position 0.

    Attributes:
        query: `[B, Hq, Tq, D]`, the last tokens, or those from `first_query` on.
        key, value: `[B, Hkv, Tk, D]`.
        alpha: alpha of entmax, a number or `[Hq]`.
        scaling: factor of the logits, `[Hq]`, the learned scale included.
        causal: whether queries see earlier keys only.
        layer: number of the attention module.
        first_query: `[B]` int64, position of the first query of each text; by default the queries are the last tokens.
        valid: `[B, Tk]` bool, False behind the last token of a shorter text, where an encoder would see it.
        end: `[1]` int64, tokens of the texts, in a prompt that is recorded (`ModelCall.end`): what stands behind them
            must change nothing for them; `None` for all that come.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: float | Tensor
    scaling: Tensor
    causal: bool
    layer: int
    first_query: Tensor | None = None
    valid: Tensor | None = None
    end: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Return `alpha`, `scaling` and `causal` as keyword arguments of the functions of `hf_sparse.ops.entmax`."""
        return {"alpha": self.alpha, "scaling": self.scaling, "causal": self.causal}


class Predictor:
    """Decide which keys a query may attend to. It holds no tensors: these are in `SparsefinderParameters`.

    Attributes:
        learns_graph: whether the graph is predicted from learned projections, and tokens have codes.
        needs_whole_text: whether the graph depends on later tokens too, so that it is for encoders only.
        finds_support: whether no key with weight is missing in the graph, so that attention equals that over all keys.
        points_needed: the least number of queries and keys that the predictor can be fitted to.
    """

    learns_graph: ClassVar[bool] = False
    needs_whole_text: ClassVar[bool] = False
    finds_support: ClassVar[bool] = False

    def __init__(self, config: SparsefinderConfig) -> None:
        self.config = config

    @property
    def points_needed(self) -> int:
        return 1

    @property
    def prompt_edge(self) -> int | None:
        """Return what `SparseAttentionLayer.prompt_edge` says, where keys are attended to that this predictor names."""
        return None

    def sees_all(self, queries: int, keys: int) -> bool:
        """Tell whether so many new queries attend to all of so many keys, whatever the text is."""
        return False

    def buffers(self, kv_heads: int) -> dict[str, tuple[int, ...]]:
        """Name the tensors that the predictor is fitted to, with their shapes."""
        return {}

    def fit(self, learned: "SparsefinderParameters", points: Tensor, generator: torch.Generator | None) -> None:
        """Fit the buffers to projected training text; see `fit_predictors`.

        Args:
            points: `[Hkv, N, r]`, see `hf_sparse.ops.predictors.clustering.training_points`, or only keys.
            generator: for random choices.

        Raises:
            ValueError: more clusters or bins than points.
        """

    def graph(
        self, learned: "SparsefinderParameters", text: AttentionInputs, codes: Codes | None
    ) -> Tiles | Tensor | None:
        """Predict the graph of texts: tiles, or edges `[B, Hq, Tq, Tk]` bool, or None for all keys.

        Args:
            codes: codes of queries `[B, Hq, Tk, c]` and keys `[B, Hkv, Tk, c]`, for all tokens of the texts; None where
                `learns_graph` is False.
        """
        raise NotImplementedError
