"""Measure how much dense attention a key receives from distant queries: the target on which a scorer is warmed up."""

import torch
from torch import Tensor

_BUFFER = 1 << 26  # logits held at once


@torch.no_grad()
def far_attention_mass(query: Tensor, key: Tensor, *, window: int, scaling: float, causal: bool = True) -> Tensor:
    """Average the dense attention that each key receives from queries whose window does not hold it.

    Summed over the query heads of the key's group, averaged over those queries.
    Needs time quadratic in `T`, as dense attention does, and memory linear in it.

    Args:
        query: `[B, Hq, T, D]`; key: `[B, Hkv, T, D]`, both of a whole sequence.
        window: window of the queries, as in `sparsek_attention`.
        scaling: multiplies the logits.
        causal: whether queries see earlier keys only.

    Returns:
        `[B, Hkv, T]` float32, between 0 and `Hq / Hkv`; 0 for keys that are in the window of every query that sees
        them, such as the last `window` ones in the causal case.
    """
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, length, dim)
    index = torch.arange(length, device=query.device)
    mass = torch.zeros((batch, kv_heads, length), dtype=torch.float32, device=query.device)
    seen = torch.zeros(length, dtype=torch.float32, device=query.device)
    rows = max(1, _BUFFER // max(1, batch * heads * length))
    for start in range(0, length, rows):
        end = min(start + rows, length)
        reached = end if causal else length  # keys that some of these queries see
        position, key_index = index[start:end, None], index[:reached]
        logits = (grouped[:, :, :, start:end] @ key[:, :, None, :reached].transpose(-1, -2)).float() * scaling
        if causal:
            logits = logits.masked_fill_(key_index > position, -torch.inf)
            far = position - key_index >= window
        else:
            offset = key_index - position + window // 2
            far = (offset < 0) | (offset >= window)
        mass[..., :reached] += (logits.softmax(-1) * far).sum((2, 3))
        seen[:reached] += far.sum(0)
    return mass / seen.clamp(min=1)
