"""Run the kernels with the arguments of `entmax_attention`, autocast included."""

import torch
from torch import Tensor

from hf_sparse.ops.entmax.inputs import Inputs
from hf_sparse.ops.entmax.layout import listed_layout
from hf_sparse.ops.entmax.triton.attention import attend
from hf_sparse.ops.entmax.triton.jobs import Lists
from hf_sparse.ops.tiles.tiles import Tiles


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None,
    first_query: Tensor | None,
    tiles: Tiles | None,
) -> Tensor:
    """Return `[B, Hq, Tq, D]`; see `hf_sparse.ops.entmax.entmax_attention`, which has checked all but the lists.

    Raises:
        ValueError: lists that are not of these queries and keys, or that are not ascending.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for torch's own attention
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            tensors = (query.to(dtype), key.to(dtype), value.to(dtype))
            return fused_attention(*tensors, alpha, scaling, causal, valid, first_query, tiles)
    lists = None if tiles is None else lists_of(tiles, Inputs(query, key, 1.0, causal, valid, first_query))
    with torch.cuda.device_of(query):  # where Triton launches
        return attend(
            query, key, value, alpha=alpha, scaling=scaling, causal=causal, valid=valid, first_query=first_query,
            lists=lists,
        )[0]  # fmt: skip


def lists_of(tiles: Tiles, inputs: Inputs) -> Lists:
    """Return lists of tiles as the kernels take them.

    Raises:
        ValueError: lists that are not of these queries and keys, or that are not ascending.
    """
    layout, tiles = listed_layout(tiles, inputs)
    counts = tiles.lengths
    if counts is None:
        counts = (tiles.index >= 0).sum(-1, dtype=torch.int32)  # `tiles.counts` would be converted in one more launch
    return Lists(tiles.index, counts.contiguous(), tiles.size, layout.rows, layout.lead)
