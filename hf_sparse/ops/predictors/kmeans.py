"""Run k-means for all heads of a layer at once: k-means++ seeds, then Lloyd's iterations.

Lloyd 1982; Arthur and Vassilvitskii 2007. The same points and generator state give the same centroids.
"""

import torch
from torch import Tensor

_ITERATIONS = 50  # at most; it ends when nothing moves


@torch.no_grad()
def kmeans(points: Tensor, clusters: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Find centroids that locally minimise the squared distance of each point to its nearest one.

    A cluster that loses all its points is moved to the point that is farthest from its own centroid, so none stays
    empty while there are enough different points.

    Args:
        points: `[H, N, r]`, the training points of each head.
        clusters: 1 to `N`.
        generator: on any device, for the seeds; torch's own by default.

    Returns:
        `[H, clusters, r]` float32 (float64 for float64).

    Raises:
        ValueError: more clusters than points, or points that are no `[H, N, r]` or not finite.
    """
    if points.ndim != 3:
        raise ValueError(f"expected points [H, N, r], got {tuple(points.shape)}")
    if not 1 <= clusters <= points.shape[1]:
        raise ValueError(f"expected 1 to {points.shape[1]} clusters of {points.shape[1]} points, got {clusters}")
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if not points.isfinite().all():
        raise ValueError("expected finite points, got NaN or infinity: leave padding out (training_points does)")
    centroids = _seeds(points, clusters, generator)
    for _ in range(_ITERATIONS):
        distance, nearest = _nearest(points, centroids)
        moved = _means(points, nearest, distance, clusters)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the squared distance to the nearest centroid, and its index, `[H, N]` each."""
    best = torch.full(points.shape[:2], torch.inf, dtype=points.dtype, device=points.device)
    which = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
    for index in range(centroids.shape[1]):
        distance = (points - centroids[:, index, None]).square().sum(-1)
        nearer = distance < best
        best, which = torch.where(nearer, distance, best), which.masked_fill(nearer, index)
    return best, which


def _seeds(points: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    heads, length, _ = points.shape
    head = torch.arange(heads, device=points.device)

    def draw(weight: Tensor) -> Tensor:
        """Draw one point per head, `[H, r]`, with a probability in proportion to its weight `[H, N]`."""
        where = points.device if generator is None else generator.device
        share = torch.rand((heads, 1), generator=generator, device=where, dtype=torch.float64).to(points.device)
        total = weight.double().cumsum(-1)
        index = torch.searchsorted(total, share * total[:, -1:], right=True)
        return points[head, index[:, 0].clamp(max=length - 1)]

    seeds = [draw(torch.ones(heads, length, device=points.device))]
    distance = torch.full((heads, length), torch.inf, dtype=points.dtype, device=points.device)
    for _ in range(clusters - 1):
        distance = torch.minimum(distance, (points - seeds[-1][:, None]).square().sum(-1))
        seeds.append(draw(distance))
    return torch.stack(seeds, 1)


def _means(points: Tensor, nearest: Tensor, distance: Tensor, clusters: int) -> Tensor:
    heads, _, rank = points.shape
    count = points.new_zeros((heads, clusters)).scatter_add_(1, nearest, torch.ones_like(distance))
    total = points.new_zeros((heads, clusters, rank))
    total.scatter_add_(1, nearest[..., None].expand(-1, -1, rank), points)
    mean = total / count.clamp(min=1)[..., None]
    empty = count == 0
    if not empty.any():
        return mean
    # The n-th empty cluster of a head goes to its n-th farthest point.
    farthest = distance.argsort(dim=1, descending=True, stable=True)[:, :clusters]
    which = farthest.gather(1, (empty.cumsum(1) - 1).clamp(min=0))
    moved = points.gather(1, which[..., None].expand(-1, -1, rank))
    return torch.where(empty[..., None], moved, mean)
