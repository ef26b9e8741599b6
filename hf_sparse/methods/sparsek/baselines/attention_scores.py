"""Score keys by the attention that they receive: of all queries, of the last one, or of the last ones of a prompt."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from hf_sparse.methods.sparsek.baselines.adaptive import AdaptiveBaseline


@dataclass(frozen=True)
class H2O(AdaptiveBaseline):
    """Keep keys that have received the most attention: H2O (Zhang et al. 2023, 2306.14048).

    A score is the sum of a key's attention weights since it came, that in the window included. The paper halves the
    budget between heavy hitters and recent keys and has no sinks; here `k`, `window` and `sinks` are the configured
    ones.
    """

    def update(self, scores: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        return scores + weights.sum(2)


@dataclass(frozen=True)
class TOVA(AdaptiveBaseline):
    """Keep keys that the last query attends to most: TOVA (Oren et al. 2024, 2401.06104).

    The paper averages over all heads of a layer and protects no key; here every KV head chooses for itself, and the
    configured window and sinks stay, as under the other baselines.
    """

    @property
    def watched(self) -> int | None:
        return 1

    def update(self, scores: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        return weights[:, :, -1]


@dataclass(frozen=True)
class SnapKV(AdaptiveBaseline):
    """Keep keys that the last queries of a prompt attend to: SnapKV (Li et al. 2024, 2404.14469).

    A prompt, the first input to a cache, is attended densely, which no other baseline does: it needs memory for all its
    keys until its last `observation` queries have voted. A vote is the attention weights summed over those queries,
    averaged over `kernel` neighbouring positions. Later inputs of several tokens are taken in blocks, each of which
    votes anew on the keys that are there. A text without a cache is taken in blocks from the start.

    Decoding changes no score. The paper's cache then grows by every token; here the slots are fixed and the window
    moves on: a key of the prompt that leaves it stays if its vote is high enough, one that was generated has no vote
    and leaves.

    Attributes:
        observation: queries that vote, at least 1; those of one input, if that has fewer.
        kernel: positions that are averaged, odd.
    """

    block: int = 32
    observation: int = 32
    kernel: int = 5
    dense_prompt: ClassVar[bool] = True
    watches_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.observation, int) or self.observation < 1:
            raise ValueError(f"SnapKV.observation must be an integer of at least 1, got {self.observation!r}")
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"SnapKV.kernel must be an odd integer of at least 1, got {self.kernel!r}")

    @property
    def watched(self) -> int | None:
        return self.observation

    def update(self, scores: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        votes, reach = weights.sum(2), self.kernel // 2
        # Neighbours in position, which evicted keys between two slots are not. They are added in the order of
        # positions: keys with the same neighbours tie to the last bit, and the lower position wins, however rounded.
        near = F.pad(positions, (reach, reach)).unfold(-1, self.kernel, 1)
        close = (near - positions.unsqueeze(-1)).abs() <= reach
        parts = F.pad(votes, (reach, reach)).unfold(-1, self.kernel, 1).masked_fill(~close, 0.0).unbind(-1)
        return sum(parts[1:], parts[0]) / self.kernel
