"""Join queries and keys whose projected points are near. Every pair costs, between tiles too.

Treviso et al. 2022 (arXiv 2109.12188), squared Euclidean distance, the one that the projections are trained with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.predictors.projections import by_group

_FAR = 1e30  # squared distance of a key that is not there


def squared_distances(query: Tensor, key: Tensor) -> Tensor:
    """Compute squared distances `[B, Hq, Tq, Tk]` of points `[B, Hq, Tq, r]` and `[B, Hkv, Tk, r]`.

    In float32, or float64 for float64; dimension by dimension, so that the distance of two points does not depend on
    which others are there.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    of_query, of_key = by_group(query.to(dtype), key.shape[1]), key.to(dtype)[:, :, None]
    total = of_query.new_zeros((*of_query.shape[:4], key.shape[2]))
    for dim in range(query.shape[3]):
        total += (of_query[..., dim, None] - of_key[..., None, :, dim]).square()
    return total.flatten(1, 2)


def tile_log_mass(query: Tensor, key: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Sum `exp(-|q - k|^2)` over the keys of each tile: its logarithm, `[B, Hq, n, nk]` float32.

    Args:
        query: `[B, Hq, n, r]`, mean points of tiles of queries.
        key: `[B, Hkv, Tk, r]`, points of single keys.
        size: keys per tile.
        valid: `[B, Tk]` bool, False for a key that is not there; None for no such key.
    """
    # One product makes -|q - k|^2 = 2 q k - |k|^2 - |q|^2. In float64, and rounded: products of other shapes round
    # differently, and the graph must not depend on them.
    keys = key.shape[2]
    query, key = query.double(), F.pad(key.double(), (0, 0, 0, -keys % size))
    length = key.square().sum(-1, keepdim=True)
    length[:, :, keys:] = _FAR
    if valid is not None:
        length[:, :, :keys].masked_fill_(~valid[:, None, :, None], _FAR)
    key = torch.cat([key, length, torch.ones_like(length)], -1)
    length = query.square().sum(-1, keepdim=True)
    query = by_group(torch.cat([2 * query, -torch.ones_like(length), -length], -1), key.shape[1])
    logits = (query @ key[:, :, None].transpose(-1, -2)).float().flatten(1, 2)
    return logits.unflatten(3, (-1, size)).logsumexp(4)
