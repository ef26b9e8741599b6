"""Attend within rows that hold padding anywhere."""

from typing import Any

import torch
from torch import Tensor

from hf_sparse.ops.selection import sparsek_attention


@torch.compiler.disable  # its loops over tiles unroll into a graph of minutes, another one for every length
def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    exists: Tensor | None,
    **options: Any,
) -> Tensor:
    """Call `sparsek_attention` for rows that hold padding anywhere, which moves to the front and back again.

    Args:
        valid: `[B, Tq]` bool, real queries; `None` if there is no padding at all.
        exists: `[B, Tk]` bool, real keys.
        options: of `sparsek_attention`.
    """
    if valid is None or exists is None:
        return sparsek_attention(query, key, value, scores, **options)

    def to_end(mask: Tensor) -> Tensor:  # a stable order, padding first
        return mask.int().argsort(dim=-1, stable=True)

    def move(tensor: Tensor, order: Tensor) -> Tensor:
        order = order[:, None, :, None] if tensor.ndim == 4 else order[:, None, :]
        return tensor.gather(2, order.expand_as(tensor))

    query_order, key_order = to_end(valid), to_end(exists)
    output = sparsek_attention(
        move(query, query_order),
        move(key, key_order),
        move(value, key_order),
        move(scores, key_order),
        start=(~exists).sum(-1),
        **options,
    )
    return move(output, query_order.argsort(dim=-1))
