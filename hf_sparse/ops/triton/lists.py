"""Which keys a query reaches, as two integers per key and one list per tile of queries. Plain PyTorch.

Scores are frozen and thresholds only rise, so every key is attended on one contiguous interval of positions,

    key j is attended by the query at position p  iff  begin[j] <= p < until[j],

causal or not, in the window, selected or a sink. Kernels need no other mask. What is left is to say where to look for
the keys of a tile: in the tile's list, and in the keys around it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse.ops.prefix import Scan

# Before and after every position; their difference fits into int32.
ALWAYS = -(1 << 29)
NEVER_ENDS = 1 << 29


class Tables(NamedTuple):
    """What the kernels read about keys.

    A query at position p finds its keys in the list of its tile (the first `sinks` keys of the row, then `lists`) and
    among the keys from `s - left` to `p + right`, with s the position of the first query of the tile (p itself without
    causal order). Keys of the list do not stand in that range, except those with `begin = ALWAYS`, which are skipped
    there.

    Attributes:
        begin: `[B, Hkv, Tk]` int32, or `None` for `begin[j] = j`, which is causal order.
        until: `[B, Hkv, Tk]` int32; 0 for padding, which nobody attends to.
        lists: `[B, Hkv, n_tiles, W]` int32 or int64, keys in the order of their scores, best first, -1 for none.
        tile: queries that share a list.
        left, right: the window of the query at position p is `p - left` to `p + right`; gates are 1 there.
        sinks: of every row, from `first` on, in front of its lists.
        first: `[B]` int64, the first key of each row that is no padding.
        scores, ends: of soft gates in causal order, `scores` float32 and `until` in the order of `lists`; 0 is the end
            of what is no candidate.
    """

    begin: Tensor | None
    until: Tensor
    lists: Tensor
    tile: int
    left: int
    right: int
    sinks: int
    first: Tensor
    scores: Tensor | None = None
    ends: Tensor | None = None


def causal_tables(
    found: Scan, scores: Tensor, first: Tensor, *, queries: int, window: int, sinks: int, tile: int
) -> Tables:
    """Tables of causal attention, from the scan of `scores` `[B, Hkv, Tk]` with lists for tiles of `tile` queries."""
    keys = scores.shape[-1]
    end = torch.searchsorted(found.floor, found.rank, right=True)
    if found.tau is not None:
        end = torch.minimum(end, torch.searchsorted(found.tau.detach(), scores.detach()))
    index = torch.arange(keys, device=scores.device)
    start = first[:, None, None]
    until = torch.maximum((end + (keys - queries)).masked_fill_(found.rank == 0, 0), index + window)
    until = until.masked_fill_(index < start + sinks, keys).masked_fill_(index < start, 0).to(torch.int32)
    tables = Tables(None, until, found.lists.contiguous(), tile, window - 1, 0, sinks, first)
    if found.tau is None:
        return tables
    places = tables.lists.clamp(min=0).long().flatten(2)
    candidate = (tables.lists.flatten(2) >= 0) & (places >= start + sinks)
    ends = until.gather(2, places).masked_fill_(~candidate, 0).view(tables.lists.shape)
    return tables._replace(scores=scores.detach().gather(2, places).view(tables.lists.shape), ends=ends)


def bidirectional_tables(gates: Tensor, first: Tensor, *, window: int, width: int) -> Tables:
    """Tables of an encoder.

    Args:
        gates: `[B, Hkv, T]`; keys with a gate above 0, sinks included, are shared by all queries of the row.
        first: see `Tables`.
        window: as in `sparsek_attention`.
        width: no row has more shared keys than this.
    """
    length = gates.shape[-1]
    left, right = window // 2, window - 1 - window // 2
    index = torch.arange(length, device=gates.device)
    shared = gates > 0
    begin = (index - right).expand_as(gates).masked_fill(shared, ALWAYS).to(torch.int32)
    until = (index + left + 1).masked_fill(index < first[:, None, None], 0)
    until = until.expand_as(gates).masked_fill(shared, NEVER_ENDS).to(torch.int32)
    best = gates.sort(dim=-1, descending=True, stable=True)
    lists = best.indices[..., :width].masked_fill(best.values[..., :width] <= 0, -1)
    return Tables(begin, until, lists.unsqueeze(-2).contiguous(), max(1, length), left, right, 0, first)


def by_lifetime(tables: Tables) -> Tensor:
    """`[B, Hkv, Tk]` int64: all keys, the longest attended first, and of about the same time the earlier ones first.

    Consecutive keys of this order are attended by about the same queries, and the longest work comes first.
    """
    begin = tables.begin
    if begin is None:
        begin = torch.arange(tables.until.shape[-1], device=tables.until.device, dtype=torch.int32)
    halves = (tables.until - begin).clamp(min=1).to(torch.float32).log2().mul(2).to(torch.uint8)
    return halves.argsort(dim=-1, descending=True, stable=True)
