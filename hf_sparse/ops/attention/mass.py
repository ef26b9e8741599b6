"""How much dense attention a key receives from queries that have left it behind: what a scorer is warmed up on."""

import torch
from torch import Tensor

_BUFFER = 1 << 26  # logits held at once


@torch.no_grad()
def far_attention_mass(query: Tensor, key: Tensor, *, window: int, scaling: float) -> Tensor:
    """Mean dense causal attention that each key receives from queries outside its window.

    Summed over the query heads of the key's group, averaged over those queries.
    Needs time quadratic in `T`, as dense attention does, and memory linear in it.

    Args:
        query: `[B, Hq, T, D]`; key: `[B, Hkv, T, D]`, both of a whole sequence.
        window: queries at a distance below `window` do not count.
        scaling: multiplies the logits.

    Returns:
        `[B, Hkv, T]` float32, between 0 and `Hq / Hkv`; 0 for the last `window` keys, which no query has left behind.
    """
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, length, dim)
    index = torch.arange(length, device=query.device)
    mass = torch.zeros((batch, kv_heads, length), device=query.device)
    rows = max(1, _BUFFER // max(1, batch * heads * length))
    for start in range(0, length, rows):
        position = index[start : start + rows, None]
        logits = (grouped[:, :, :, start : start + rows] @ key[:, :, None].transpose(-1, -2)).float() * scaling
        weight = logits.masked_fill_(index > position, -torch.inf).softmax(-1)
        mass += (weight * (position - index >= window)).sum((2, 3))
    return mass / (length - window - index).clamp(min=1)
