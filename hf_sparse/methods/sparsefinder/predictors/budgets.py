"""Numbers of tiles that differ between heads."""

import torch
from torch import Tensor

#: Mean tiles per query tile for which a table of budgets has a column; larger ones are in proportion to the last.
MEANS = 64


def divided_tiles(budgets: Tensor, mean: int | Tensor, listed: int) -> Tensor:
    """Count the tiles of each list where budgets of heads were fitted, `[B, H, nq]` int64.

    Args:
        budgets: `[H, MEANS]`, see `SparsefinderParameters`.
        mean: tiles per query tile, over heads the mean: a number, or int64 `[nq]` or `[B, 1, nq]`; `B` is 1 otherwise.
        listed: `nq`.
    """
    wanted = torch.as_tensor(mean, device=budgets.device)
    wanted = (wanted if wanted.ndim else wanted.expand(listed)).reshape(-1, listed)
    counts = budgets[:, wanted.clamp(1, MEANS) - 1].transpose(0, 1) * (wanted / MEANS).clamp(min=1)[:, None]
    return counts.round().long()
