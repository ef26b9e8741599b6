"""Attend to the tokens nearby and to the first ones of the text, in time and memory linear in the length.

Blocks of the text attend to themselves and to the block before, as in Longformer (Beltagy et al. 2020, arXiv
2004.05150), and to the first tokens, on which models that were trained with all keys lean whatever these say (Xiao et
al. 2023, arXiv 2309.17453).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: The first tokens of a text that all later ones attend to.
FIRST = 4


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, scaling: float, first: int = FIRST
) -> Tensor:
    """Compute causal softmax attention of each block of `window` tokens to itself, the block before and the first keys.

    So each token attends to at least the `window` tokens before it, and to fewer than `2 * window` of them; texts of no
    more than `2 * window` tokens are attended to as a whole.

    Args:
        query: `[B, Hq, T, D]`, positions applied.
        key, value: `[B, Hkv, T, D]` of the same tokens; Hkv divides Hq.
        window: tokens of a block, at least 1.
        scaling: multiplies the logits.
        first: the first tokens of the text that all attend to.

    Returns:
        `[B, Hq, T, D]`.
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]

    def attend(start: int, stop: int, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        # Not `enable_gqa`, with which a GPU has no kernel that takes a mask.
        keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
        queries = query[:, :, start:stop]
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, scale=scaling)

    whole = 2 * window
    outputs = [attend(0, min(whole, length), key[:, :, :whole], value[:, :, :whole], None)]
    for start in range(whole, length, window):
        stop, before = min(start + window, length), start - window
        sinks = min(first, before)
        keys, values = (torch.cat([x[:, :, :sinks], x[:, :, before:stop]], dim=2) for x in (key, value))
        seen = torch.ones(stop - start, keys.shape[2], dtype=torch.bool, device=query.device)
        outputs.append(attend(start, stop, keys, values, seen.tril(sinks + window)))
    return torch.cat(outputs, dim=2)
