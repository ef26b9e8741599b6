"""Attend to whole texts of which nothing is kept, where no gradient is wanted and nothing else looks on.

On short texts the host sets the pace, and what serves training too asks for much that is of no use here: a text that
fits into the budget needs no scores at all, and of a longer one all launches are noted together.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.methods.sparsek.reading import scoring_of, settings_of, takes
from hf_sparse.methods.sparsek.tokens import NewTokens
from hf_sparse.ops.triton import installed, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention

_TRITON = installed()


def attend_without_cache(attention: "SparseKAttention", new: NewTokens) -> Tensor | None:
    """Attend to texts from their beginning on, in `eval` mode and in causal order.

    Returns:
        `[B, Hq, T, D]`; `None` if the texts have to take another path: there is padding, they are compiled or
        differentiated, under autocast, or for a baseline or an observer, or no kernel takes what came.
    """
    query, key, value, hidden_states, valid, scaling = new
    if valid is not None or attention.training or not attention.causal or torch.is_grad_enabled():
        return None
    if not attention.uses_scorer or torch.compiler.is_compiling() or torch.is_autocast_enabled(query.device.type):
        return None
    budget = attention.budget
    if key.shape[2] <= budget.fewest_slots:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    if not _TRITON or type(query) is not Tensor or not is_on_gpu(query):
        return None
    scoring = scoring_of(attention)
    if scoring is None or not takes(new, scoring, budget.k):
        return None
    from hf_sparse.ops.selection.triton.reading import attend_text

    settings = settings_of(budget, scaling, scoring)
    return attend_text(query, key, value, hidden_states, scoring.weight, scoring.slope, settings)
