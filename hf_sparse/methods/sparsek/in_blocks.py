"""Attend block after block, for baselines whose scores follow the attention that keys receive."""

from typing import Any

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.baselines import AdaptiveBaseline
from hf_sparse.methods.sparsek.baselines.blocks import attend_in_blocks
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.continued import attend_after, parts
from hf_sparse.methods.sparsek.tokens import ScoredTokens


@torch.compiler.disable
def attend_block_after_block(
    tokens: ScoredTokens, cache: SparseKCacheLayer | None, baseline: AdaptiveBaseline, budget: Budget
) -> Tensor:
    """Attend to several new tokens through the slots, so that the attention of a block chooses the keys of the next.

    Args:
        tokens: the new ones.
        cache: holds what is kept of those before, and takes in the new ones; `None` for whole texts without a cache.
        baseline: cuts the tokens into blocks, and changes the scores after each.
        budget: how the budget of the layer is spent now.
    """
    outputs = [_attend_in_equal_blocks(*part, baseline) for part in parts(tokens, cache, budget)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _attend_in_equal_blocks(tokens: ScoredTokens, cache: Any, budget: Budget, baseline: AdaptiveBaseline) -> Tensor:
    """Attend block after block with a budget that is the same for all heads."""
    length, step = tokens.length, min(baseline.block, budget.window)
    if _is_plain_text(tokens, cache, baseline):
        return _attend_plain_text(tokens, cache, baseline, budget)
    if cache is None:
        cache = SparseKCacheLayer(*budget)  # type: ignore[arg-type]
        cache.lazy_initialization(tokens.key, tokens.value)
    elif cache.empty and baseline.dense_prompt:
        step, budget = length, budget._replace(k=cache.slots + length)
    blocks = (tokens.part(begin, begin + step) for begin in range(0, length, step))
    # For a few queries, the implementation "dense" has the fewest launches.
    return torch.cat([attend_after(block, cache, budget, baseline, implementation="dense") for block in blocks], 2)


def _is_plain_text(tokens: ScoredTokens, cache: SparseKCacheLayer | None, baseline: AdaptiveBaseline) -> bool:
    """Tell whether `attend_in_blocks` takes the tokens: a text begins here, without padding, and not as one block."""
    if tokens.valid is not None or torch.is_autocast_enabled(tokens.query.device.type):
        return False
    return cache is None or (cache.empty and not baseline.dense_prompt)


def _attend_plain_text(
    tokens: ScoredTokens, cache: SparseKCacheLayer | None, baseline: AdaptiveBaseline, budget: Budget
) -> Tensor:
    """Attend block after block to a text from its beginning on, without padding, and fill the cache if there is one."""
    output, kept = attend_in_blocks(tokens.query, tokens.key, tokens.value, baseline, budget, scaling=tokens.scaling)
    if cache is not None:
        keys, values = (
            states.gather(2, kept.index.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))
            for states in (tokens.key, tokens.value)
        )
        cache.fill(keys, values, kept.scores, kept.index, tokens.index[:, -1] + 1)
    return output
