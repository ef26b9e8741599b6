"""Count the tiles that the settings and the budgets of heads give to each query tile."""

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.ops.tiles.select import counts_for_sparsity

#: Mean tiles per query tile for which a table of budgets has a column; larger ones are in proportion to the last.
MEANS = 64


def mean_tiles(config: SparsefinderConfig, own: Tensor, total: int, *, causal: bool) -> int | Tensor:
    """Count the key tiles of each query tile, over heads the mean: a number, or int64 of the shape of `own`.

    Args:
        own: `[..., nq]` int64, see `hf_sparse.ops.tiles.tiles.own_tiles`; a graph of tokens has tiles of one.
        total: tiles of keys, none of padding.
        causal: whether queries see earlier keys only.
    """
    if config.tile is not None and (causal or config.tiles_per_query is not None):
        return config.causal_tiles
    return counts_for_sparsity(own + 1 if causal else torch.full_like(own, total), config.sparsity)


def divided_tiles(budgets: Tensor, mean: int | Tensor, listed: int) -> Tensor:
    """Count the tiles of each list where budgets of heads were fitted, `[B, H, nq]` int64.

    Args:
        budgets: `[H, MEANS]`, see `SparsefinderParameters`.
        mean: tiles per query tile, over heads the mean: a number, or int64 `[nq]` or `[B, 1, nq]`; `B` is 1 otherwise.
        listed: `nq`.
    """
    if isinstance(mean, int):
        mean = torch.full((listed,), mean, device=budgets.device)
    means = mean.to(budgets.device).reshape(-1, listed)
    counts = budgets[:, means.clamp(1, MEANS) - 1].transpose(0, 1) * (means / MEANS).clamp(min=1)[:, None]
    return counts.round().long()
