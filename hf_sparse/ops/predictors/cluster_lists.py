"""List tiles for one causal query per head by the clusters of the keys, on a GPU, in eager and in compiled models."""

from typing import Any

import torch
from torch import Tensor

from hf_sparse.ops.triton import DTYPES, installed


def takes_kernel(codes: Tensor, centroids: Tensor) -> bool:
    """Tell whether `cluster_lists` takes such codes and centroids."""
    return codes.is_cuda and centroids.dtype in DTYPES and installed()


def cluster_lists(
    points: Tensor,
    codes: Tensor,
    centroids: Tensor,
    profile: Tensor | None,
    position: Tensor,
    size: int,
    rows: int,
    window: int,
    global_tokens: int,
    count: int,
    grouped: bool,
) -> Tensor:
    """Return the tiles of each list, `[B, H, 1, count]` int64, -1 behind the last.

    Args:
        points: `[B, Hq, r]` float32, mean points of the queries that describe each list.
        codes: `[B, Hkv, S, 1]` int64, the cluster of each key; there may be anything behind the position.
        centroids: `[Hkv, C, r]`.
        profile: `[Hq, BINS]`, see `hf_sparse.ops.predictors.profile`, or None.
        position: `[B]` int64, where the queries stand.
        size, rows, window, global_tokens: as in `hf_sparse.ops.tiles.select.step_tiles`.
        count: tiles of a list, the own tile and those of window and global tokens included.
        grouped: one list for the query heads of a KV head.
    """
    arguments = (points, codes, centroids, profile, position, size, rows, window, global_tokens, count, grouped)
    if torch.compiler.is_compiling():
        return torch.ops.hf_sparse.cluster_lists(*arguments)
    return _cluster_lists(*arguments)


def _cluster_lists(
    points: Tensor,
    codes: Tensor,
    centroids: Tensor,
    profile: Tensor | None,
    position: Tensor,
    size: int,
    rows: int,
    window: int,
    global_tokens: int,
    count: int,
    grouped: bool,
) -> Tensor:
    """List as `cluster_lists`, by the kernel."""
    from hf_sparse.ops.predictors.triton import cluster_step  # Triton is there only beside a CUDA device

    lists = cluster_step.Lists(size, rows, window, global_tokens, count, grouped)
    with torch.cuda.device_of(codes):  # where Triton launches
        return cluster_step.cluster_lists(points, codes, centroids, profile, position, lists)


# A compiled model holds it as one operator.
_operator = torch.library.custom_op("hf_sparse::cluster_lists", mutates_args=())(_cluster_lists)


@_operator.register_fake
def _shape(points: Tensor, codes: Tensor, *others: Any) -> Tensor:
    count, grouped = others[-2:]
    heads = codes.shape[1] if grouped else points.shape[1]
    return torch.empty((len(points), heads, 1, count), dtype=torch.int64, device=codes.device)
