"""Patterns that others attend by, between tokens: baselines on the same model. For analysis and short texts.

Each is a mask `[B, H, Tq, Tk]` of allowed pairs, where `B` and `H` are 1 if all texts or heads have the same. They are
simulated on a trained entmax model, as Treviso et al. 2022 (arXiv 2109.12188) do; no model was trained with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.graphs.allowed import allowed_edges, positions_of
from hf_sparse.ops.graphs.buckets import bucket_edges, without_padding
from hf_sparse.ops.graphs.clustering import assign_balanced
from hf_sparse.ops.graphs.points import check_points


def window_edges(
    queries: int,
    keys: int,
    *,
    window: int,
    global_tokens: int = 0,
    causal: bool,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Window and global tokens, `[B, 1, Tq, Tk]` (Longformer, Beltagy et al. 2020, without dilation).

    Args:
        queries, keys: `Tq` and `Tk`.
        window: tokens, at least 0, as in `window_and_global`.
        global_tokens: how many of the first valid tokens attend to all and are attended by all.
        causal, valid: as in `allowed_edges`.
        device: of the result, that of `valid` by default.

    Raises:
        ValueError: a negative `window` or `global_tokens`.
    """
    if window < 0 or global_tokens < 0:
        raise ValueError(f"window and global_tokens must be at least 0, got {window} and {global_tokens}")
    position = positions_of(queries, keys, device=device if valid is None else valid.device)
    key = torch.arange(keys, device=position.device)
    begin = position[:, None] - (window - 1 if causal else window // 2)
    near = (key >= begin) & (key < begin + window)
    first = (key < global_tokens)[None] if valid is None else valid & (valid.cumsum(-1) <= global_tokens)
    shared = first[:, None, None] | first[:, None, position, None]
    return (near | shared) & allowed_edges(position, keys, causal=causal, valid=valid)


def bigbird_edges(
    queries: int,
    keys: int,
    *,
    heads: int,
    window: int,
    global_tokens: int = 0,
    random: int,
    causal: bool,
    valid: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """`window_edges` and `random` more keys of each row and head, `[B, H, Tq, Tk]` (BigBird, Zaheer et al. 2020).

    The random keys are drawn evenly from all allowed ones that are not attended yet; the released simulation draws them
    from the first few tokens only.

    Args:
        heads: `H`.
        random: keys per row, at least 0.
        generator: on any device.
        queries, keys, window, global_tokens, causal, valid, device: as in `window_edges`.

    Raises:
        ValueError: a negative number.
    """
    if random < 0:
        raise ValueError(f"a row cannot have {random} random keys")
    near = window_edges(
        queries, keys, window=window, global_tokens=global_tokens, causal=causal, valid=valid, device=device
    )
    position = positions_of(queries, keys, device=near.device)
    free = allowed_edges(position, keys, causal=causal, valid=valid) & ~near
    where = near.device if generator is None else generator.device
    score = torch.rand((len(near), heads, queries, keys), generator=generator, device=where).to(near.device)
    drawn = score.masked_fill(~free, 2.0).argsort(dim=-1)[..., :random]
    return near | (torch.zeros_like(score, dtype=torch.bool).scatter_(-1, drawn, True) & free)


def strided_edges(
    queries: int,
    keys: int,
    *,
    stride: int,
    causal: bool,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The last `stride` keys and every `stride`-th before (Sparse Transformer "strided", Child et al. 2019).

    Args:
        stride: at least 1. Without causal order the same holds to both sides.
        queries, keys, causal, valid, device: as in `window_edges`.

    Raises:
        ValueError: `stride` below 1.
    """
    _check_stride(stride)
    position = positions_of(queries, keys, device=device if valid is None else valid.device)
    back = position[:, None] - torch.arange(keys, device=position.device)
    joined = (back.abs() < stride) | (back % stride == 0)
    return joined & allowed_edges(position, keys, causal=causal, valid=valid)


def fixed_edges(
    queries: int,
    keys: int,
    *,
    stride: int,
    expressivity: int = 1,
    causal: bool,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The query's own block of `stride` keys and the last `expressivity` keys of every block (Sparse Transformer
    "fixed", Child et al. 2019).

    Args:
        stride: at least 1.
        expressivity: 1 to `stride`.
        queries, keys, causal, valid, device: as in `window_edges`.

    Raises:
        ValueError: `stride` or `expressivity` out of range.
    """
    _check_stride(stride)
    if not 1 <= expressivity <= stride:
        raise ValueError(f"expressivity must be from 1 to the stride, {stride}, got {expressivity}")
    position = positions_of(queries, keys, device=device if valid is None else valid.device)
    key = torch.arange(keys, device=position.device)
    joined = (position[:, None] // stride == key // stride) | (key % stride >= stride - expressivity)
    return joined & allowed_edges(position, keys, causal=causal, valid=valid)


def lsh_rotations(
    rank: int,
    buckets: int,
    rounds: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random rotations `[rounds, rank, buckets / 2]` float32, for `lsh_buckets`.

    Raises:
        ValueError: `buckets` odd or below 2, or `rounds` below 1.
    """
    if buckets < 2 or buckets % 2 or rounds < 1:
        raise ValueError(f"hashing needs an even number of buckets and at least 1 round, got {buckets} and {rounds}")
    where = device if generator is None else generator.device
    return torch.randn((rounds, rank, buckets // 2), generator=generator, device=where).to(device or where)


def lsh_buckets(points: Tensor, rotations: Tensor, valid: Tensor | None = None) -> Tensor:
    """Reformer's hash of each round, `argmax([xR, -xR])` (Kitaev et al. 2020), the same for queries and keys.

    Args:
        points: `[B, H, T, r]`, projected or raw, the last `T` of `Tk` positions.
        rotations: `[rounds, r, buckets / 2]`, see `lsh_rotations`.
        valid: `[B, Tk]` bool, or None.

    Returns:
        `[B, H, T, rounds]` int64, `round * buckets + hash`, -1 at padding.

    Raises:
        ValueError: rotations of another rank.
    """
    rounds, rank, half = rotations.shape
    if points.shape[-1] != rank:
        raise ValueError(f"the rotations are for rank {rank}, got points {tuple(points.shape)}")
    turned = torch.einsum("bhtr,nrc->bhtnc", points.to(rotations.dtype), rotations)
    found = torch.cat([turned, -turned], -1).argmax(-1)
    return without_padding(found + torch.arange(rounds, device=points.device) * 2 * half, valid)


def lsh_edges(
    query_points: Tensor, key_points: Tensor, rotations: Tensor, *, causal: bool, valid: Tensor | None = None
) -> Tensor:
    """Pairs with the same hash in at least one round (Reformer, without its sorting into chunks).

    Args:
        query_points: `[B, Hq, Tq, r]`; key_points: `[B, Hkv, Tk, r]`.
        rotations: see `lsh_rotations`.
        causal, valid: as in `allowed_edges`.

    Raises:
        ValueError: input that does not fit.
    """
    check_points(query_points, key_points, valid)
    query, key = (lsh_buckets(points, rotations, valid) for points in (query_points, key_points))
    return bucket_edges(query, key, 2 * rotations.shape[0] * rotations.shape[2], causal=causal, valid=valid)


def routing_clusters(
    query_points: Tensor, key_points: Tensor, centroids: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clusters of queries `[B, Hq, T, C]` and keys `[B, Hkv, T, C]` in which each centroid takes `T // C + 1` of both.

    Routing Transformer (Roy et al. 2021): points and centroids on the unit sphere. As published, in causal models too,
    which points a centroid takes depends on the whole text: a baseline that sees the future in its pattern.

    Args:
        query_points: `[B, Hq, T, r]`; key_points: `[B, Hkv, T, r]`, of whole texts.
        centroids: `[Hkv, C, r]`, k-means of `torch.nn.functional.normalize`d training points.
        valid: `[B, T]` bool, or None.

    Raises:
        ValueError: input that does not fit.
    """
    check_points(query_points, key_points, valid)
    if query_points.shape[2] != key_points.shape[2]:
        raise ValueError(
            f"routing needs whole texts, got {query_points.shape[2]} queries of {key_points.shape[2]} keys"
        )
    centroids = F.normalize(centroids, dim=-1)
    width = key_points.shape[2] // centroids.shape[1] + 1
    query, key = (
        assign_balanced(F.normalize(points, dim=-1), centroids, width, valid) for points in (query_points, key_points)
    )
    return query, key


def routing_edges(
    query_points: Tensor, key_points: Tensor, centroids: Tensor, *, causal: bool, valid: Tensor | None = None
) -> Tensor:
    """Pairs that some centroid takes both of; see `routing_clusters` for arguments and errors."""
    query, key = routing_clusters(query_points, key_points, centroids, valid)
    return bucket_edges(query, key, centroids.shape[1], causal=causal, valid=valid)


def oracle_edges(
    probabilities: Tensor,
    count: int,
    *,
    causal: bool,
    valid: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The `count` likeliest keys of each row, `[B, Hq, R, Tk]`: the best that any graph of `count` keys can do.

    Args:
        probabilities: `[B, Hq, R, Tk]`, entmax over all allowed keys.
        count: keys per row, at least 1; rows with fewer allowed keys have all of them.
        causal, valid: as in `allowed_edges`.
        position: `[R]` int64, of the rows among the keys; the last `R` by default.

    Raises:
        ValueError: `count` below 1.
    """
    if count < 1:
        raise ValueError(f"a row needs at least 1 key, got count={count}")
    rows, keys = probabilities.shape[2:]
    if position is None:
        position = torch.arange(keys - rows, keys, device=probabilities.device)
    allowed = allowed_edges(position, keys, causal=causal, valid=valid)
    best = probabilities.masked_fill(~allowed, -1.0).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, best, True) & allowed


def _check_stride(stride: int) -> None:
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
