"""The attention of the last query."""

from dataclasses import dataclass

from torch import Tensor

from hf_sparse.methods.sparsek.baselines.adaptive import AdaptivePolicy


@dataclass(frozen=True)
class TOVA(AdaptivePolicy):
    """Keys that the last query attends to most stay: TOVA (Oren et al. 2024, 2401.06104).

    The paper averages over all heads of a layer and protects no key; here every KV head chooses for itself, and the
    configured window and sinks stay, as under the other policies.
    """

    @property
    def watched(self) -> int | None:
        return 1

    def update(self, scores: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        return weights[:, :, -1]
