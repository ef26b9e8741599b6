"""Find the buckets of patterns that compare points: hashes of the Reformer, clusters of the Routing Transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.predictors.clustering import assign_balanced
from hf_sparse.ops.predictors.projections import check_points


def lsh_rotations(
    rank: int,
    buckets: int,
    rounds: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw random rotations `[rounds, rank, buckets / 2]` float32, for `lsh_buckets`.

    Raises:
        ValueError: `buckets` odd or below 2, or `rounds` below 1.
    """
    if buckets < 2 or buckets % 2 or rounds < 1:
        raise ValueError(f"hashing needs an even number of buckets and at least 1 round, got {buckets} and {rounds}")
    where = device if generator is None else generator.device
    return torch.randn((rounds, rank, buckets // 2), generator=generator, device=where).to(device or where)


def lsh_buckets(points: Tensor, rotations: Tensor) -> Tensor:
    """Hash points in each round by `argmax([xR, -xR])` (Reformer, Kitaev et al. 2020), queries and keys alike.

    Args:
        points: `[B, H, T, r]`, projected or raw.
        rotations: `[rounds, r, buckets / 2]`, see `lsh_rotations`.

    Returns:
        `[B, H, T, rounds]` int64, `round * buckets + hash`.

    Raises:
        ValueError: rotations of another rank.
    """
    rounds, rank, half = rotations.shape
    if points.shape[-1] != rank:
        raise ValueError(f"the rotations are for rank {rank}, got points {tuple(points.shape)}")
    turned = torch.einsum("bhtr,nrc->bhtnc", points.to(rotations.dtype), rotations)
    hashes = torch.cat([turned, -turned], -1).argmax(-1)
    return hashes + torch.arange(rounds, device=points.device) * 2 * half


def routing_clusters(query_points: Tensor, key_points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Let each centroid take its `T // C + 1` nearest queries and as many keys.

    Routing Transformer (Roy et al. 2021): points and centroids on the unit sphere. As published, in causal models too,
    which points a centroid takes depends on the whole text: a baseline that sees the future in its pattern.

    Args:
        query_points: `[B, Hq, T, r]`; key_points: `[B, Hkv, T, r]`, of whole texts.
        centroids: `[Hkv, C, r]`, k-means of `torch.nn.functional.normalize`d training points.

    Returns:
        Clusters of queries `[B, Hq, T, C]` and of keys `[B, Hkv, T, C]`, as from `assign_balanced`.

    Raises:
        ValueError: input that does not fit.
    """
    check_points(query_points, key_points)
    if query_points.shape[2] != key_points.shape[2]:
        raise ValueError(
            f"routing needs whole texts, got {query_points.shape[2]} queries of {key_points.shape[2]} keys"
        )
    centroids = F.normalize(centroids, dim=-1)
    width = key_points.shape[2] // centroids.shape[1] + 1
    query, key = (
        assign_balanced(F.normalize(points, dim=-1), centroids, width) for points in (query_points, key_points)
    )
    return query, key
