"""Attend to tokens that follow others, through the slots that hold what is kept of those, and take them in."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.baselines import AdaptiveBaseline, Baseline
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.padded import attend_padded
from hf_sparse.methods.sparsek.ragged_cache import RaggedCacheLayer
from hf_sparse.methods.sparsek.tokens import ScoredTokens


def attend_step(tokens: ScoredTokens, cache: SparseKCacheLayer, baseline: Baseline | None, budget: Budget) -> Tensor:
    """Give the one new token of each row a slot, and attend to the slots, `[B, Hq, 1, D]`.

    Args:
        tokens: the new ones.
        cache: holds the kept keys, and takes in the new ones.
        baseline: whose scores the tokens have; `None` for those of the scorer.
        budget: how the budget of the layer is spent now.
    """
    valid = None if tokens.valid is None else tokens.valid[:, 0]
    cache.insert(tokens.key, tokens.value, tokens.scores, valid)
    output = cache.attend(tokens.query, scaling=tokens.scaling)
    if isinstance(baseline, AdaptiveBaseline) and baseline.watches_steps:
        for part, slots, of_part in parts(tokens, cache, budget):
            state = slots.keys, slots.scores, part.positions, slots.positions
            scores = baseline.watch(part.query, *state, budget=of_part, scaling=part.scaling)
            slots.scores.copy_(_still_pinned(scores, slots.scores))
    return output


def attend_more(tokens: ScoredTokens, cache: SparseKCacheLayer, baseline: Baseline | None, budget: Budget) -> Tensor:
    """Attend to several new tokens, head by head where heads differ, and take them in; see `attend_step`."""
    outputs = [attend_after(*part, baseline) for part in parts(tokens, cache, budget)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def parts(
    tokens: ScoredTokens, cache: SparseKCacheLayer | None, budget: Budget
) -> Iterator[tuple[ScoredTokens, Any, Budget]]:
    """Yield new tokens with their slots and budget: all at once, or head by head where budgets differ."""
    if isinstance(budget.k, int):
        yield tokens, cache, budget
        return
    slots = cache.heads() if isinstance(cache, RaggedCacheLayer) else [None] * len(budget.k)
    for head, of_head in enumerate(slots):
        yield tokens.of_head(head), of_head, budget.of_head(head)


def attend_after(tokens: ScoredTokens, cache: Any, budget: Budget, baseline: Baseline | None, **options: Any) -> Tensor:
    """Attend to several tokens after others: the kept keys are all that they can reach, so they come first.

    Args:
        tokens, cache, baseline: see `attend_step`.
        budget: of the attention, the same for all heads.
        options: of `sparsek_attention`.
    """
    old_keys, old_values, old_scores, old_positions = cache.ordered()
    valid = torch.ones_like(tokens.index, dtype=torch.bool) if tokens.valid is None else tokens.valid
    keys, values = torch.cat([old_keys, tokens.key], 2), torch.cat([old_values, tokens.value], 2)
    scores = torch.cat([old_scores, tokens.scores], 2)
    exists = torch.cat([old_positions[:, 0] >= 0, valid], 1)  # the same for every head
    output = attend_padded(
        tokens.query, keys, values, scores, valid, exists, **budget._asdict(), scaling=tokens.scaling, **options
    )
    new_positions = tokens.index.masked_fill(~valid, -1)
    positions = torch.cat([old_positions, new_positions[:, None].expand_as(tokens.scores)], 2)
    if isinstance(baseline, AdaptiveBaseline):
        state = keys, scores, new_positions, positions
        watched = baseline.watch(tokens.query, *state, budget=budget, scaling=tokens.scaling)
        scores = _still_pinned(watched, scores)
    cache.fill(keys, values, scores, positions, cache.seen + valid.sum(-1))
    return output


def _still_pinned(scores: Tensor, before: Tensor) -> Tensor:
    """Return new scores of keys, but the old ones of those that were pinned."""
    return scores.masked_fill(before == torch.inf, torch.inf)
