"""Bound the logits of a tile by the extremes of its keys, and so its support (the "page bound").

With the least and the greatest value of each feature over the keys of a tile, no logit of query q exceeds

    u = sum_d max(q_d low_d, q_d high_d)

and tau over any subset of the keys is a lower bound of tau over all. So a tile with (alpha - 1) u <= tau of the subset
holds no key of the support, and adding every other tile makes the result exact: tau only rises.

Cost: two products of length D per query and tile of keys, `2 / size` of the work of the logits, in slices; one bool per
pair of tiles stays. The box is that of Quest (Tang et al. 2024, arXiv 2406.10774); the rule and its margin are ours.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.entmax.attention import entmax_thresholds
from hf_sparse.ops.entmax.blocks import BUFFER, Plan
from hf_sparse.ops.entmax.inputs import Inputs, prepare
from hf_sparse.ops.entmax.layout import Layout, listed_layout
from hf_sparse.ops.tiles.allowed import allowed_tiles, tiles_of_valid
from hf_sparse.ops.tiles.tiles import Tiles


@torch.no_grad()
def complete_tiles(
    query: Tensor,
    key: Tensor,
    tiles: Tiles,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
) -> tuple[Tiles, Tensor]:
    """Add to each list the tiles that the bound cannot exclude for some query: entmax over the result is full entmax.

    Args:
        query, key, tiles, alpha, scaling, causal, valid, first_query: as in `entmax_attention`.

    Returns:
        The longer lists, with all batches and with as many heads as the given ones (KV heads if those have 1), and the
        queries for which the given lists were already proven to suffice, `[B, Hq, Tq]` bool.

    Raises:
        ValueError: as `entmax_attention`.
    """
    inputs = prepare(query, key, alpha, scaling, causal, valid, first_query)
    layout, tiles = listed_layout(tiles, inputs)
    needed, certified = missing(inputs, layout, tiles, entmax_thresholds(inputs, Plan(layout, causal, valid, tiles)))
    return tiles.union(Tiles.of_mask(needed, tiles.size, tiles.rows)), certified


@torch.no_grad()
def missing(inputs: Inputs, layout: Layout, tiles: Tiles, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Find the tiles off the list that may hold support, and the queries for which no such tile exists.

    Args:
        tau: `[B, Hq, Tq]` over the listed tiles.

    Returns:
        `[B, H, nq, nk]` bool and `[B, Hq, Tq]` bool.
    """
    skipped = ~tiles.mask(layout.key_tiles).flatten(0, 2)
    needed = torch.zeros_like(skipped)
    certified = skipped.new_ones((layout.jobs, layout.share * layout.rows, 1))
    limit = without_queries_at_padding(tau - _margin(inputs, layout, tau), inputs)
    for jobs, excess in excesses(inputs, layout, limit):
        possible = (excess > 0) & skipped[jobs, None, :]
        needed[jobs] = possible.any(1)
        certified[jobs] = ~possible.any(-1, keepdim=True)
    shape = (layout.batch, layout.heads, layout.query_tiles, layout.key_tiles)
    return needed.view(shape), layout.unfold_queries(certified).squeeze(-1)


def without_queries_at_padding(limit: Tensor, inputs: Inputs) -> Tensor:
    """Raise the limit `[B, Hq, Tq]` of queries at padding to `inf`, which no bound exceeds."""
    if inputs.valid is None:
        return limit
    return limit.masked_fill(~inputs.valid[:, None, inputs.valid.shape[1] - limit.shape[2] :], torch.inf)


def excesses(inputs: Inputs, layout: Layout, limit: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield by how much the bound of every tile exceeds a limit `[B, Hq, Tq]`, for some jobs at a time.

    Each item is a slice of jobs and their excesses `[n, share * rows, nk]`.

    It is `-inf` for tiles without an allowed key and for queries that do not exist.
    """
    device = inputs.query.device
    query = layout.fold_queries(inputs.query)
    low, high = (part.flatten(0, 1) for part in tile_extremes(inputs.key, layout.size, inputs.valid))
    # Rows that do not exist are folded to 0, those that do to 1.
    limit, exists = layout.fold_queries(torch.stack([limit, torch.ones_like(limit)], -1)).split(1, dim=-1)
    limit = limit.masked_fill(exists == 0, torch.inf)
    filled = None if inputs.valid is None else tiles_of_valid(inputs.valid, layout.size)
    own_tile = layout.own_tiles(device)
    allowed = allowed_tiles(own_tile, layout.key_tiles, causal=inputs.causal, valid_tiles=filled)
    # Extremes are copied for each job: with few queries in it, these take the memory, not the bounds.
    held = max(layout.share * layout.rows, 2 * low.shape[-1])
    at_once = max(1, BUFFER.get(device.type, 1 << 24) // (held * layout.key_tiles))
    with torch.autocast(device.type, enabled=False):
        for start in range(0, layout.jobs, at_once):
            jobs = torch.arange(start, min(start + at_once, layout.jobs), device=device)
            here = slice(start, start + len(jobs))
            kv = layout.kv_of(jobs)
            bound = query[here].clamp(min=0) @ high[kv].transpose(-1, -2)
            bound += query[here].clamp(max=0) @ low[kv].transpose(-1, -2)
            batch = layout.batch_of(jobs) if len(allowed) > 1 else torch.zeros_like(jobs)
            excluded = ~allowed[batch, 0, jobs % layout.query_tiles]
            yield here, bound.sub_(limit[here]).masked_fill_(excluded[:, None], -torch.inf)


def tile_extremes(key: Tensor, size: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the least and greatest value of each feature over the valid keys of a tile, `[B, Hkv, nk, D]` each.

    Args:
        key: `[B, Hkv, Tk, D]`.
        size: keys per tile; the last tile may be shorter.
        valid: `[B, Tk]` bool. A tile of padding only gets 0 and 0.
    """
    batch, heads, keys, dim = key.shape
    real = key.new_ones((batch, keys), dtype=torch.bool) if valid is None else valid
    real = F.pad(real, (0, -keys % size)).view(batch, 1, -1, size, 1)
    tiles = F.pad(key, (0, 0, 0, -keys % size)).view(batch, heads, -1, size, dim)
    low = tiles.masked_fill(~real, torch.inf).amin(3)
    high = tiles.masked_fill(~real, -torch.inf).amax(3)
    empty = low > high
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def _margin(inputs: Inputs, layout: Layout, tau: Tensor) -> Tensor:
    """Bound what rounding may have added to tau or taken from the page bound, `[B, Hq, Tq]`.

    Products of length D are off by at most `D eps |q| |k| / 2`; the bound takes two, the logits behind tau one. tau is
    found to a few `eps` after a shift by the largest logit, which lies within 1 of it. Only keys that a query sees
    count, so that no margin looks ahead.
    """
    eps = torch.finfo(tau.dtype).eps
    longest = inputs.key.norm(dim=-1)
    longest = longest.cummax(-1).values if inputs.causal else longest.amax(-1, keepdim=True).expand_as(longest)
    if layout.first_query is None:
        longest = longest[..., layout.keys - layout.queries :]
    else:
        position = layout.first_query[:, None] + torch.arange(layout.queries, device=tau.device)
        longest = longest.gather(-1, position.clamp(max=layout.keys - 1)[:, None].expand(-1, layout.kv_heads, -1))
    longest = longest.repeat_interleave(layout.query_heads // layout.kv_heads, dim=1)
    product = 2 * inputs.key.shape[-1] * eps * inputs.query.norm(dim=-1) * longest
    # Without a key tau is -inf, and every tile lies above it.
    return product + 32 * eps * (2 + tau.abs().masked_fill(tau == -torch.inf, 0.0))
