"""Distance: a query and a key are joined iff their projected points are near.

Between tokens this is `O(Tq * Tk * r)`, so it is for analysis only.

Treviso et al. 2022 (arXiv 2109.12188), squared Euclidean distance, the one that the projections are trained with.
"""

import torch
from torch import Tensor

from hf_sparse.ops.graphs.allowed import allowed_edges, positions_of
from hf_sparse.ops.graphs.points import by_group, check_points


def squared_distances(query: Tensor, key: Tensor) -> Tensor:
    """`[B, Hq, Tq, Tk]` from points `[B, Hq, Tq, r]` and `[B, Hkv, Tk, r]`; float32, or float64 for float64.

    Dimension by dimension, so that the distance of two points does not depend on which others are there.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    of_query, of_key = by_group(query.to(wide), key.shape[1]), key.to(wide)[:, :, None]
    total = of_query.new_zeros((*of_query.shape[:4], key.shape[2]))
    for dim in range(query.shape[3]):
        total += (of_query[..., dim, None] - of_key[..., None, :, dim]).square()
    return total.flatten(1, 2)


def distance_edges(
    query_points: Tensor, key_points: Tensor, threshold: float | Tensor, *, causal: bool, valid: Tensor | None = None
) -> Tensor:
    """Allowed pairs whose squared distance is below the threshold, `[B, Hq, Tq, Tk]` bool. For analysis: `O(Tq Tk r)`.

    Args:
        query_points: `[B, Hq, Tq, r]`, the last `Tq` of `Tk` positions.
        key_points: `[B, Hkv, Tk, r]`.
        threshold: a number, or one per query head, `[Hq]`; strict.
        causal, valid: as in `allowed_edges`.

    Raises:
        ValueError: points that do not fit.
    """
    check_points(query_points, key_points, valid)
    if isinstance(threshold, Tensor) and threshold.ndim:
        threshold = threshold[:, None, None]
    position = positions_of(query_points.shape[2], key_points.shape[2], device=key_points.device)
    near = squared_distances(query_points, key_points) < threshold
    return near & allowed_edges(position, key_points.shape[2], causal=causal, valid=valid)
