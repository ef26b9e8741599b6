"""Compute SparseK's objective `attention`: scores learn which keys the dense model attends to from far away."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsek.attention import Observer, SparseKAttention
from hf_sparse.ops.selection.attention_mass import far_attention_mass
from hf_sparse.patches import sparse_layers_in_use

#: Number of last keys of a chunk that are left out: too few queries follow for their mass to mean anything.
UNSETTLED = 64


def attention(model: nn.Module, chunks: Tensor, **options: Any) -> Tensor:
    """Return the mean squared error of scores against the log of far-attention mass, both centred; mean over layers.

    The forward is dense, so the layers are independent and nothing but the scorers is differentiated.

    Args:
        model: with SparseK.
        chunks: `[B, T]` int64.
        **options: for the model's forward.
    """
    losses: list[Tensor] = []

    def observer_of(layer: SparseKAttention) -> Observer:
        def observe(query: Tensor, key: Tensor, scores: Tensor, scaling: float) -> None:
            budget = layer.budget
            mass = far_attention_mass(query, key, window=budget.window, scaling=scaling, causal=layer.causal)
            # In both directions, every key is far from about as many queries.
            unsettled = budget.window + UNSETTLED if layer.causal else 0
            settled = slice(budget.sinks, max(budget.sinks + 1, scores.shape[-1] - unsettled))
            target, score = (mass[..., settled] + 1e-6).log(), scores[..., settled]
            error = (score - score.mean(-1, keepdim=True)) - (target - target.mean(-1, keepdim=True))
            losses.append(error.square().mean().to(chunks.device))

        return observe

    with ExitStack() as observed:
        for layer in sparse_layers_in_use(model, SparseKAttention):
            observed.enter_context(override([layer], observer=observer_of(layer)))
        model(input_ids=chunks, **options)
    return torch.stack(losses).mean()
