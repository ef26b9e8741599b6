"""Compute the gates of keys that all queries of a row share, as the attention of an encoder selects them."""

import torch
from torch import Tensor

from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.projection import sparsek
from hf_sparse.ops.selection.thresholds import rank_scores


def shared_gates(problem: Problem) -> Tensor:
    """Return the gate of every key, the same for all queries of its row.

    Returns:
        `[B, Hkv, T]` in the dtype of the scores: 0 for padding, 1 for sinks and for every token of a row that fits into
        the budget, and what the selection gives elsewhere.
    """
    k, support = problem.k, problem.support
    length = problem.scores.shape[-1]
    index, first = torch.arange(length, device=problem.scores.device), problem.first[:, None, None]
    real, sink = index >= first, index < first + problem.sinks
    z = problem.trained_scores.masked_fill(~real | sink, -torch.inf)
    if support is not None and support < length:
        z = z.masked_fill(rank_scores(z.detach()) <= length - support, -torch.inf)
    selected = sparsek(z, k) if problem.soft else (z > -torch.inf).to(z.dtype)
    whole = sink | (length - first <= problem.sinks + problem.window + k)
    return selected.masked_fill(real & whole, 1.0)
