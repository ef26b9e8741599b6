"""Score tiles by published attention patterns, for `best_tiles`, so that all have the same number of tiles.

They are simulated on a trained entmax model, as Treviso et al. 2022 (arXiv 2109.12188) do; no model was trained with
them. Hashing and routing compare points, see `patterns`.

Global tokens are no score: pass `window_and_global` as `always` to every pattern that is to have them. Longformer is
`nearest_scores`, BigBird is `random_scores`, each with window and global tiles as `always`.
"""

import torch
from torch import Tensor

from hf_sparse.ops.predictors.buckets import key_counts, matching_pairs, query_counts
from hf_sparse.ops.predictors.patterns import lsh_buckets, routing_clusters
from hf_sparse.ops.predictors.projections import by_group, check_points, tile_of_query
from hf_sparse.ops.tiles.tiles import tile_counts


def nearest_scores(own: Tensor, tiles: int) -> Tensor:
    """Score nearer tiles higher, `[1, 1, nq, nk]` float32: the widest window that the number of tiles allows.

    Args:
        own: `[nq]` int64, see `own_tiles`.
        tiles: `nk`.
    """
    return -(torch.arange(tiles, device=own.device) - own[:, None]).abs().float()[None, None]


def random_scores(
    batch: int,
    heads: int,
    listed: int,
    tiles: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Score tiles at random for each row and head, `[B, H, nq, nk]` float32."""
    where = device if generator is None else generator.device
    return torch.rand((batch, heads, listed, tiles), generator=generator, device=where).to(device or where)


def strided_scores(count: int | Tensor, own: Tensor, tiles: int, *, causal: bool) -> Tensor:
    """Score half of a row's tiles next to the query and the rest at equal distances, `[B, 1, nq, nk]` float32.

    Sparse Transformer "strided" (Child et al. 2019) at a given number of tiles; tiles that remain go to the nearest.

    Args:
        count: tiles per query tile, or `[nq]` or `[B, 1, nq]` int64, the same as `best_tiles` is given.
        own: `[nq]` int64, see `own_tiles`.
        tiles: `nk`.
        causal: as in `allowed_edges`.
    """
    place, reach, near_count, far_count = _halves(count, own, tiles, causal)
    stride = -(-(reach - near_count).clamp(min=1) // far_count.clamp(min=1))
    regular = (place - near_count + 1) % stride == 0
    return _in_order(place, (place < near_count) | (regular & (far_count > 0)), place < near_count, tiles)


def fixed_scores(count: int | Tensor, own: Tensor, tiles: int, *, causal: bool) -> Tensor:
    """Score half of a row's tiles next to the query and the rest in columns that all share, `[B, 1, nq, nk]`.

    Sparse Transformer "fixed" (Child et al. 2019) at a given number of tiles; tiles that remain go to the nearest.
    Arguments as in `strided_scores`.
    """
    place, _, near_count, far_count = _halves(count, own, tiles, causal)
    stride = max(1, -(-tiles // max(1, int(far_count.max()))))
    column = torch.arange(tiles, device=own.device) % stride == stride - 1
    return _in_order(place, (place < near_count) | (column & (far_count > 0)), place < near_count, tiles)


def lsh_scores(
    query_points: Tensor,
    key_points: Tensor,
    rotations: Tensor,
    *,
    size: int,
    rows: int | None = None,
    lag: int = 0,
    per_group: bool = False,
) -> Tensor:
    """Count the pairs of tokens with the same hash in each round, `[B, Hq, nq, nk]` (`Hkv` with `per_group`) float32.

    Args:
        query_points: `[B, Hq, Tq, r]`, the last `Tq` of `Tk` positions; key_points: `[B, Hkv, Tk, r]`.
        rotations: see `lsh_rotations`.
        size, rows: as in `tile_counts`.
        lag: see `tile_of_query`.
        per_group: add the scores of the query heads that share a KV head.
    """
    check_points(query_points, key_points)
    buckets = 2 * rotations.shape[0] * rotations.shape[2]
    query, key = (lsh_buckets(points, rotations) for points in (query_points, key_points))
    of_queries = query_counts(query, buckets, keys=key.shape[2], size=rows or size, lag=lag)
    return matching_pairs(of_queries, key_counts(key, buckets, size=size), per_group=per_group)


def routing_scores(
    query_points: Tensor,
    key_points: Tensor,
    centroids: Tensor,
    *,
    size: int,
    rows: int | None = None,
    per_group: bool = False,
) -> Tensor:
    """Count the pairs of tokens that a centroid takes both of, `[B, Hq, nq, nk]` (`Hkv` with `per_group`) float32.

    Args:
        query_points, key_points, centroids: as in `routing_clusters`.
        size, rows: as in `tile_counts`.
        per_group: add the scores of the query heads that share a KV head.
    """
    query, key = routing_clusters(query_points, key_points, centroids)
    of_queries = query_counts(query, centroids.shape[1], keys=key.shape[2], size=rows or size)
    return matching_pairs(of_queries, key_counts(key, centroids.shape[1], size=size), per_group=per_group)


def oracle_scores(probabilities: Tensor, *, size: int, rows: int | None = None, kv_heads: int | None = None) -> Tensor:
    """Sum the entmax mass of each pair of tiles, `[B, Hq, nq, nk]` in the given dtype, which no list can exceed.

    Args:
        probabilities: `[B, Hq, Tq, Tk]`, 0 in rows that do not count.
        size, rows: as in `tile_counts`.
        kv_heads: add the masses of the query heads that share a KV head, `[B, Hkv, nq, nk]`.
    """
    queries, keys = probabilities.shape[2:]
    listed, total = tile_counts(queries, keys, size, rows)
    row = tile_of_query(queries, keys, rows or size, 0, probabilities.device)
    lead = probabilities.shape[:2]
    by_key = probabilities.new_zeros((*lead, queries, total))
    by_key.index_add_(3, torch.arange(keys, device=probabilities.device) // size, probabilities)
    mass = probabilities.new_zeros((*lead, listed, total)).index_add_(2, row, by_key)
    return mass if kv_heads is None else by_group(mass, kv_heads).sum(2)


def _halves(count: int | Tensor, own: Tensor, tiles: int, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divide the tiles of each row into those next to the query and those farther away.

    Returns:
        The place of each key tile by its distance from the query tile, `[nq, nk]`; how many tiles a row may have,
        `[nq, 1]`; and how many of its count lie next to the query and farther away, `[..., nq, 1]` each."""
    own = own[:, None]
    distance = (torch.arange(tiles, device=own.device) - own).abs()
    place = distance if causal else distance.argsort(dim=-1, stable=True).argsort(dim=-1)
    reach = own + 1 if causal else torch.full_like(own, tiles)
    room = torch.as_tensor(count, device=own.device)
    room = (room if room.ndim else room.expand(len(own)))[..., None].minimum(reach)
    near_count = (room + 1) // 2
    return place, reach, near_count, room - near_count


def _in_order(place: Tensor, listed: Tensor, first: Tensor, tiles: int) -> Tensor:
    """Score the tiles `first`, then the other `listed` ones, then the rest, each by its place."""
    score = listed.float() + first.float() - place.float() / (tiles + 1)
    return score if score.ndim == 4 else score[None, None]
