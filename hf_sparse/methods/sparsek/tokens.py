"""Hold the new tokens of one forward through an attention module, after they are scored."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class ScoredTokens:
    """Hold what attention needs of the tokens of one forward, with their scores.

    Attributes:
        query: `[B, Hq, T, D]`; key, value: `[B, Hkv, T, D]`, positions applied.
        scores: `[B, Hkv, T]` float32, of the scorer or a baseline.
        index: `[B, T]` int64, of each token among the real tokens of its row; padding repeats a neighbour's.
        valid: `[B, T]` bool, False for padding; `None` if every token is real.
        scaling: multiplies the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    index: Tensor
    valid: Tensor | None
    scaling: float

    @property
    def length(self) -> int:
        """Return the number of tokens, padding included."""
        return self.query.shape[2]

    @property
    def positions(self) -> Tensor:
        """Return the index of each token, `[B, T]`, and -1 for padding."""
        return self.index if self.valid is None else self.index.masked_fill(~self.valid, -1)

    def part(self, begin: int, end: int) -> "ScoredTokens":
        """Return the tokens from `begin` up to `end`."""
        return replace(
            self,
            query=self.query[:, :, begin:end],
            key=self.key[:, :, begin:end],
            value=self.value[:, :, begin:end],
            scores=self.scores[:, :, begin:end],
            index=self.index[:, begin:end],
            valid=None if self.valid is None else self.valid[:, begin:end],
        )

    def of_head(self, head: int) -> "ScoredTokens":
        """Return what one KV head and its query heads have of the tokens."""
        group = self.query.shape[1] // self.key.shape[1]
        one = slice(head, head + 1)
        return replace(
            self,
            query=self.query[:, head * group : (head + 1) * group],
            key=self.key[:, one],
            value=self.value[:, one],
            scores=self.scores[:, one],
        )


def token_index(valid: Tensor | None, seen: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Return the index of each new token among the real tokens of its row, `[B, T]` int64.

    Args:
        valid: `[B, T]` bool or `None`; padding repeats a neighbour's index.
        seen: real tokens of each row before these, `[B]`; `None` for 0.
        batch, length: `B` and `T`.
        device: of the result.
    """
    if valid is None:
        index = torch.arange(length, device=device).expand(batch, -1)
    else:
        index = (valid.cumsum(-1) - 1).clamp(min=0)
    return index if seen is None else index + seen[:, None]
