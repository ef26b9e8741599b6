"""Join a query and a key iff they share a bucket, any of the query's with any of the key's.

Quantization (a bucket per dimension and bin), clustering (a bucket per centroid) and hashing (a bucket per round and
hash) differ only in how a point gets its buckets.

Between tiles, the number of joined pairs follows from how many points of each tile are in each bucket, so it costs
`nq * nk * buckets` and no buffer of `Tq x Tk`. A pair that shares two buckets counts twice.
"""

import torch
from torch import Tensor

from hf_sparse.ops.predictors.projections import by_group, tile_of_query
from hf_sparse.ops.tiles.tiles import tile_counts


def clear_padding(ids: Tensor, valid: Tensor | None) -> Tensor:
    """Put -1 (no bucket) into buckets `[B, H, T, c]` where `valid`, `[B, T]`, is False."""
    return ids if valid is None else ids.masked_fill(~valid[:, None, :, None], -1)


def bucket_edges(query_ids: Tensor, key_ids: Tensor, buckets: int) -> Tensor:
    """Find the pairs that share a bucket, `[B, Hq, Tq, Tk]` bool: for analysis and short texts.

    Args:
        query_ids: `[B, Hq, Tq, c]` int64, the buckets of each query, -1 for none.
        key_ids: `[B, Hkv, Tk, c']` int64, those of each key.
        buckets: number of buckets.
    """
    of_query, of_key = _membership(query_ids, buckets), _membership(key_ids, buckets)
    shared = by_group(of_query, key_ids.shape[1]) @ of_key[:, :, None].transpose(-1, -2)
    return (shared > 0).flatten(1, 2)


def query_counts(ids: Tensor, buckets: int, *, keys: int, size: int, lag: int = 0) -> Tensor:
    """Count the queries in each bucket among those that describe a tile, `[B, Hq, nq, buckets]` float32.

    Args:
        ids: `[B, Hq, Tq, c]` int64, -1 for none.
        buckets: number of buckets.
        keys: `Tk`.
        size: positions per tile.
        lag: see `tile_of_query`.
    """
    queries = ids.shape[2]
    return _counts(
        ids, buckets, tile_of_query(queries, keys, size, lag, ids.device), tile_counts(queries, keys, size)[0]
    )


def described_counts(ids: Tensor, exists: Tensor, buckets: int, rows: int) -> Tensor:
    """Count the queries in each bucket where `rows` queries in turn describe a tile, `[B, Hq, nq, buckets]` float32.

    Args:
        ids: `[B, Hq, nq * rows, c]` int64, -1 for none.
        exists: `[B, nq * rows]` bool, False for a query that is not there.
    """
    tile = torch.arange(ids.shape[2], device=ids.device) // rows
    return _counts(ids.masked_fill(~exists[:, None, :, None], -1), buckets, tile, ids.shape[2] // rows)


def key_counts(ids: Tensor, buckets: int, *, size: int) -> Tensor:
    """Count the keys of each tile in each bucket, `[B, Hkv, nk, buckets]` float32; see `query_counts`."""
    keys = ids.shape[2]
    return _counts(ids, buckets, torch.arange(keys, device=ids.device) // size, tile_counts(keys, keys, size)[1])


def matching_pairs(of_queries: Tensor, of_keys: Tensor, *, per_group: bool = False) -> Tensor:
    """Count the pairs of a query and a key that share a bucket, for each pair of tiles.

    Args:
        of_queries: `[B, Hq, nq, buckets]`, see `query_counts`.
        of_keys: `[B, Hkv, nk, buckets]`, see `key_counts`.
        per_group: add the scores of the query heads that share a KV head.

    Returns:
        `[B, Hq, nq, nk]` float32, or `[B, Hkv, nq, nk]` with `per_group`.
    """
    grouped = by_group(of_queries, of_keys.shape[1])
    if per_group:
        return grouped.sum(2) @ of_keys.transpose(-1, -2)
    return (grouped @ of_keys[:, :, None].transpose(-1, -2)).flatten(1, 2)


def _membership(ids: Tensor, buckets: int) -> Tensor:
    """Mark the buckets of each token, `[B, H, T, buckets]` float32 of 0 and 1."""
    member = torch.zeros((*ids.shape[:3], buckets + 1), device=ids.device)
    return member.scatter_(-1, ids.masked_fill(ids < 0, buckets), 1.0)[..., :buckets]


def _counts(ids: Tensor, buckets: int, tile: Tensor, tiles: int) -> Tensor:
    outside = tiles * buckets
    cell = tile[:, None] * buckets + ids
    cell = cell.masked_fill((ids < 0) | (tile[:, None] >= tiles), outside).flatten(2)
    count = torch.zeros((*ids.shape[:2], outside + 1), device=ids.device)
    ones = torch.ones((), device=ids.device).expand_as(cell)
    return count.scatter_add_(-1, cell, ones)[..., :outside].unflatten(-1, (tiles, buckets))
