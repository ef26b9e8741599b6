"""Let scores follow the attention that cached keys receive.

A text is taken in blocks. Within a block every query selects by the scores that the block began with, so that it
attends to as many keys as under any other baseline; after it the attention weights of its queries, summed over the
query heads of a KV head, update the scores of the keys that the last one still sees. The rest left for good. With
`block=1` this is the method token by token; a larger block is an approximation, in which the scores that evict are up
to `block - 1` tokens old. Blocks are no longer than the window: no key leaves it before it has been scored.

Blocks are cut from where a call begins: texts in pieces agree with texts in one if the pieces are whole blocks, and
rows with padding agree with the same rows alone if the padding fills whole blocks, as it always does with `block=1`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.baselines.baseline import Arrivals, Baseline
from hf_sparse.methods.sparsek.budget import Budget


@dataclass(frozen=True)
class AdaptiveBaseline(Baseline):
    """Hold what adaptive baselines share. Subclasses write `update`.

    Attributes:
        block: tokens at a time, at least 1; longer inputs are cut.
        dense_prompt: whether a prompt, the first input to a cache, is attended densely and as one block.
        watches_steps: whether scores change in decoding too.
    """

    block: int = 16
    depends_on_text: ClassVar[bool] = True
    dense_prompt: ClassVar[bool] = False
    watches_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"{type(self).__name__}.block must be an integer of at least 1, got {self.block!r}")

    @property
    def watched(self) -> int | None:
        """Say how many queries at the end of a block are watched; `None` is all of them."""
        return None

    def update(self, scores: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        """Return the scores `[B, Hkv, N]` after a block.

        Args:
            scores: `[B, Hkv, N]` before it, 0 for its own keys.
            weights: `[B, Hkv, M, N]`, attention of the watched queries, in order; rows of padding are 0.
            positions: `[B, Hkv, N]` int64, rising; -1 where there is no token.
        """
        raise NotImplementedError

    def __call__(self, new: Arrivals) -> Tensor:
        return torch.zeros(new.key.shape[:3], dtype=torch.float32, device=new.key.device)

    @torch.no_grad()
    def watch(
        self,
        query: Tensor,
        keys: Tensor,
        scores: Tensor,
        query_positions: Tensor,
        positions: Tensor,
        *,
        budget: Budget,
        scaling: float,
    ) -> Tensor:
        """Return the scores `[B, Hkv, N]` after a block; `-inf` for keys that its last query cannot see.

        Args:
            query: `[B, Hq, T, D]`; keys: `[B, Hkv, N, D]`, the kept ones and the block's own; scores: `[B, Hkv, N]`.
            query_positions: `[B, T]` int64, -1 for padding; positions: `[B, Hkv, N]` int64, of the keys.
            budget: budget of the attention; scaling: multiplies its logits.
        """
        real = query_positions >= 0
        last = real.int().argsort(dim=-1, stable=True)[:, -(self.watched or query.shape[2]) :]  # padding in front
        seen = visible(scores, query_positions.gather(1, last), positions, budget)
        rows = query.gather(2, last[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        weights = attention(rows, keys, seen, scaling)
        updated = self.update(scores, weights, positions).masked_fill(~seen[:, :, -1], -torch.inf)
        return torch.where(real.any(1)[:, None, None], updated, scores)


def visible(scores: Tensor, query_positions: Tensor, positions: Tensor, budget: Budget) -> Tensor:
    """Tell which keys each query attends to, `[B, Hkv, M, N]` bool, as `sparsek_attention` defines it.

    Args:
        scores, positions: `[B, Hkv, N]`, in the order of positions; -1 is no token.
        query_positions: `[B, M]`; -1 is padding.
        budget: budget of the attention.
    """
    k, window, sinks = budget
    assert isinstance(k, int)  # heads with different budgets come one by one
    query_positions, positions = query_positions[:, None, :, None], positions.unsqueeze(2)
    exists = (positions >= 0) & (positions <= query_positions)
    always = exists & ((positions > query_positions - window) | (positions < sinks))
    chosen = exists & ~always
    if k < scores.shape[-1]:
        order = scores.unsqueeze(2).masked_fill(~chosen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        best = torch.zeros_like(chosen).scatter_(-1, order[..., :k], True)
        chosen = chosen & best
    return always | chosen


def attention(query: Tensor, keys: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Sum attention weights over the query heads of each KV head, `[B, Hkv, M, N]` float32; 0 for unseen keys."""
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().unflatten(1, (keys.shape[1], -1))
        logits = grouped @ keys.float().unsqueeze(2).transpose(-1, -2) * scaling
        seen = seen.unsqueeze(2)
        weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
        return weights.masked_fill(~seen, 0.0).sum(2)
