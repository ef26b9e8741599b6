"""Find the gold graph: the keys that full entmax attends to."""

import torch
from torch import Tensor

from hf_sparse.ops.entmax.inputs import prepare
from hf_sparse.ops.entmax.threshold import distribution
from hf_sparse.ops.tiles.allowed import allowed_edges, positions_of


@torch.no_grad()
def support(
    query: Tensor,
    key: Tensor,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the edges with a probability above 0 under entmax over all allowed keys, for some queries or for all.

    Args:
        query, key, alpha, scaling, causal: as in `entmax_attention`.
        rows: `[R]` int64, the queries wanted, counted from 0 to `Tq - 1`; all by default, which takes `Tq x Tk`.

    Returns:
        The support, `[B, Hq, R, Tk]` bool, and the probabilities, in float32 (float64 for float64).

    Raises:
        ValueError: as `entmax_attention`, or rows that are not `[R]` int64 from 0 to `Tq - 1`.
    """
    inputs = prepare(query, key, alpha, scaling, causal)
    queries, keys = query.shape[2], key.shape[2]
    if rows is not None:
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows must be [R] int64, got {tuple(rows.shape)} {rows.dtype}")
        low, high = torch.stack(rows.aminmax()).tolist() if len(rows) else (0, 0)  # waits for the device once
        if len(rows) and not 0 <= low <= high < queries:
            raise ValueError(f"rows must be from 0 to {queries - 1}, got {low} to {high}")
    allowed = allowed_edges(positions_of(queries, keys, rows, device=query.device), keys, causal=causal)
    chosen = inputs.query if rows is None else inputs.query[:, :, rows]
    grouped = chosen.unflatten(1, (key.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        z = (grouped @ inputs.key[:, :, None].transpose(-1, -2)).flatten(1, 2)
    exponent = inputs.exponent
    if isinstance(exponent, Tensor):
        exponent = exponent[:, None, None]
    probabilities = distribution(z.masked_fill_(~allowed, -torch.inf), exponent)
    return probabilities > 0, probabilities
