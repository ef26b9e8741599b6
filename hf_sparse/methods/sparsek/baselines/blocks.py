"""Take a whole text without padding through an adaptive baseline, block by block.

Between two blocks only indices of kept keys and their scores are carried. A block sorts those scores once: counted
along that order, the eligible keys beyond the first `k` are what each of its queries has lost, and what its last query
sees is what the next block begins with. The attention weights that give the output are those that the baseline watches.
`SparseKAttention` keeps another way for texts with padding and for texts that go on from a cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.baselines.adaptive import AdaptiveBaseline
from hf_sparse.methods.sparsek.budget import Budget


@dataclass(frozen=True)
class Kept:
    """Hold the keys that are left after a text.

    Attributes:
        index: `[B, Hkv, S]` int64, rising.
        scores: `[B, Hkv, S]` float32.
    """

    index: Tensor
    scores: Tensor


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, baseline: AdaptiveBaseline, budget: Budget, *, scaling: float
) -> tuple[Tensor, Kept]:
    """Attend to a text from its beginning on, so that the attention of a block chooses the keys of the next one.

    Args:
        query: `[B, Hq, T, D]`; key, value: `[B, Hkv, T, D]`, `T` at least 1. Every token is real.
        baseline: cuts the text into blocks, no longer than the window, and changes the scores after each.
        budget: budget of the attention.
        scaling: multiplies the logits.

    Returns:
        The output `[B, Hq, T, D]` in the dtype of `query`, computed in float32 (float64 for float64), and what is kept.
    """
    batch, heads, length, _ = key.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys, values = query.to(dtype).unflatten(1, (heads, -1)), key.to(dtype), value.to(dtype)
    step = min(baseline.block, budget.window)
    tokens = torch.arange(length, device=key.device)
    kept = Kept(tokens.new_empty(batch, heads, 0), torch.empty(batch, heads, 0, device=key.device))
    outputs = []
    for begin in range(0, length, step):
        new = tokens[begin : begin + step]
        index = torch.cat([kept.index, new.expand(batch, heads, -1)], 2)
        scores = torch.cat([kept.scores, kept.scores.new_zeros(batch, heads, len(new))], 2)
        hidden = index.unsqueeze(2) > new[:, None]  # [B, Hkv, t, N], later than the query
        if index.shape[2] > budget.slots:
            hidden |= _evicted(index, scores, new, budget)
        columns = index.unsqueeze(-1)
        logits = (
            queries[:, :, :, begin : begin + step].flatten(2, 3)
            @ keys.gather(2, columns.expand(-1, -1, -1, keys.shape[-1])).transpose(-1, -2)
            * scaling
        )
        weights = logits.unflatten(2, (-1, len(new))).masked_fill(hidden.unsqueeze(2), -torch.inf).softmax(-1)
        output = weights.flatten(2, 3) @ values.gather(2, columns.expand(-1, -1, -1, values.shape[-1]))
        outputs.append(output.unflatten(2, (-1, len(new))).flatten(1, 2))
        kept = _kept(index, scores, weights, hidden[:, :, -1], baseline, budget)
    return torch.cat(outputs, 2).to(query.dtype), kept


def _evicted(index: Tensor, scores: Tensor, queries: Tensor, budget: Budget) -> Tensor:
    """Tell which keys, of those that left the window, each query has lost to `k` better ones.

    Args:
        index, scores: `[B, Hkv, N]`, of keys in the order of positions, the sinks in front.
        queries: `[t]` int64, positions.
        budget: budget of the attention.

    Returns:
        `[B, Hkv, t, N]` bool.
    """
    k, window, sinks = budget
    assert isinstance(k, int)  # heads with different budgets come one by one
    order = scores[..., sinks:].argsort(dim=-1, descending=True, stable=True)  # of equal scores the lower position wins
    left_window = index[..., sinks:].gather(-1, order).unsqueeze(2) <= (queries - window)[:, None]
    lost = left_window & (left_window.cumsum(-1, dtype=torch.int32) > k)
    evicted = torch.zeros((*lost.shape[:-1], index.shape[-1]), dtype=torch.bool, device=index.device)
    evicted[..., sinks:].scatter_(-1, order.unsqueeze(2).expand_as(lost), lost)
    return evicted


@torch.no_grad()
def _kept(
    index: Tensor, scores: Tensor, weights: Tensor, hidden: Tensor, baseline: AdaptiveBaseline, budget: Budget
) -> Kept:
    """Return what is left after a block: what its last query sees, with the scores that the baseline gives it.

    Args:
        index, scores: `[B, Hkv, N]`, of the keys of the block.
        weights: `[B, Hkv, G, t, N]`, attention of the block's queries.
        hidden: `[B, Hkv, N]` bool, keys that its last query does not see.
        baseline: as `attend_in_blocks` has it.
        budget: budget of the attention.
    """
    watched = weights[..., -(baseline.watched or weights.shape[3]) :, :]
    scores = baseline.update(scores, watched.float().sum(2), index)
    if index.shape[2] <= budget.slots:
        return Kept(index, scores)
    seen = hidden.int().argsort(dim=-1, stable=True)[..., : budget.slots]
    return Kept(index.gather(-1, seen), scores.gather(-1, seen))
