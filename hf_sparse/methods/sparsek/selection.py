"""Who gets the `k` places: the learned score, or a baseline behind the same cache and the same code path.

A policy maps the tokens of one attention module to frozen scores; everything else stays as it is, so that a baseline
differs from the learned model in the selection alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.config import SparseKConfig

# (index [B, T] of each token in its row, number of KV heads, layer) -> scores [B, Hkv, T] float32
Policy = Callable[[Tensor, int, int], Tensor]


def recency(index: Tensor, heads: int, layer: int) -> Tensor:
    """The nearest keys: a window of `window + k`, that is StreamingLLM (Xiao et al. 2023, 2309.17453).

    In an encoder the nearest keys are those on both sides, which no score per key could say: see `budget`.
    """
    return index[:, None].expand(-1, heads, -1).float()


def random(index: Tensor, heads: int, layer: int) -> Tensor:
    """Uniform and independent per layer, head and position; a hash, so that it is frozen and needs no state."""
    head = torch.arange(heads, device=index.device)[:, None] + heads * layer
    mixed = index[:, None] * 2654435761 + head * 40503 + 12345
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)).to(torch.float64).div_(2**32).float()


#: Baselines by the name that evaluation prints.
POLICIES: dict[str, Policy] = {"recency": recency, "random": random}


def budget(config: SparseKConfig, policy: Policy | None, causal: bool) -> dict[str, int]:
    """`k`, `window` and `sinks` for the attention: as configured, except that `recency` is all window in an encoder."""
    if policy is recency and not causal:
        return {"k": 0, "window": config.window + config.k, "sinks": config.sinks}
    return {"k": config.k, "window": config.window, "sinks": config.sinks}
