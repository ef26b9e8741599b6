"""Heavy hitters."""

from dataclasses import dataclass

from torch import Tensor

from hf_sparse.methods.sparsek.baselines.adaptive import AdaptivePolicy


@dataclass(frozen=True)
class H2O(AdaptivePolicy):
    """Keys that have received the most attention stay: H2O (Zhang et al. 2023, 2306.14048).

    A score is the sum of a key's attention weights since it came, that in the window included. The paper halves the
    budget between heavy hitters and recent keys and has no sinks; here `k`, `window` and `sinks` are the configured
    ones.
    """

    def update(self, scores: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        return scores + weights.sum(2)
