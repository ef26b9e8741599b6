"""Take a decoding step of SparseK in compiled code, as one operator of each layer."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.ops.selection.step import take_step

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention


def step_compiled(attention: "SparseKAttention", new: NewTokens, cache: SparseKCacheLayer) -> Tensor | None:
    """Score the new token of each row, give it a slot and attend to the slots, in code that is being compiled.

    Args:
        new: one token of each row.
        cache: has been checked for this step.

    Returns:
        `[B, Hq, 1, D]`, contiguous; `None`, with nothing changed, if the step has to take another path: it runs eager
        or with gradients, the cache has no slots yet, or a baseline or an observer is in use.
    """
    if not torch.compiler.is_compiling() or torch.is_grad_enabled() or not cache.is_initialized:
        return None
    if not attention.uses_scorer:
        return None
    query, key, value, hidden_states, valid, scaling = new
    scorer: Any = attention.sparsek_scorer[attention.active]
    weight, slope, slopes = scorer.linear
    states = scorer(hidden_states, cache.seen[:, None]) if weight is None else hidden_states
    cache.empty, total = False, None
    if not cache.is_count_read:
        total, cache.uncounted = cache.cumulative_length, 0
    return take_step(
        query, key, value, states, weight, slope, valid, cache.keys, cache.values, cache.scores, cache.positions,
        cache.seen, cache.padded_late, cache.arrived, total, *slopes,
        cache.window, cache.sinks, scaling, cache.offsets,
    )  # fmt: skip
