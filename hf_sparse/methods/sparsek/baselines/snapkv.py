"""The vote of the prompt's last queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.baselines.adaptive import AdaptivePolicy


@dataclass(frozen=True)
class SnapKV(AdaptivePolicy):
    """Keys that the last queries of a prompt attend to stay: SnapKV (Li et al. 2024, 2404.14469).

    A prompt, the first input to a cache, is attended densely, which no other policy does: it needs memory for all its
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
        votes = weights.sum(2)
        total, reach = votes.clone(), self.kernel // 2
        # Neighbours in position, which evicted keys between two slots are not.
        for shift in range(1, min(reach, votes.shape[-1] - 1) + 1):
            left, right = slice(None, -shift), slice(shift, None)
            close = positions[..., right] - positions[..., left] <= reach
            total[..., right] += torch.where(close, votes[..., left], 0.0)
            total[..., left] += torch.where(close, votes[..., right], 0.0)
        return total / self.kernel
