"""Linear-time SparseK attention of an encoder: which keys a tile of queries reaches.

Nothing arrives late here, so there is one selection per row and KV head, for all its queries, and one gate per key. A
tile of `C` consecutive queries needs

    the keys whose gate is not 0, sinks included  +  C - 1 + window keys around it

whatever the length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.ops.selection.projection import sparsek
from hf_sparse.ops.selection.thresholds import rank_scores
from hf_sparse.ops.selection.tiled import Block, attend, flat_rows, spans

# Queries per tile. Each tile gathers its own window, and most of that is shared by few of its queries.
_TILE = {"cpu": 64, "cuda": 128}


def bidirectional_sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    k: int,
    window: int,
    sinks: int,
    scaling: float,
    soft: bool,
    support: int | None,
    start: Tensor | None,
    tile: int | None = None,
) -> Tensor:
    """See `sparsek_attention`, which checks the arguments. `tile` is for tests and benchmarks."""
    batch, length = query.shape[0], query.shape[2]
    tile = min(tile or _TILE.get(query.device.type, 128), max(1, length))
    first = torch.zeros(batch, dtype=torch.int64, device=query.device) if start is None else start
    gates = shared_gates(scores if soft else scores.detach(), first, k, window, sinks, soft, support)
    reached = gates.detach() > 0
    width = int(reached.sum(-1).amax()) if reached.numel() else 0
    # In the order of positions; shorter lists go on with keys of gate 0.
    shared = reached.byte().argsort(dim=-1, descending=True, stable=True)[..., :width].contiguous()
    left, right = window // 2, window - 1 - window // 2
    reach = _Bidirectional(tile, min(left, length - 1), min(right, length - 1))
    return attend(query, key, value, gates, None, (shared, first), reach, scaling)


def shared_gates(
    scores: Tensor, first: Tensor, k: int, window: int, sinks: int, soft: bool, support: int | None
) -> Tensor:
    """`[B, Hkv, T]`: 1 for sinks and for every token of a row that fits into the budget, the selection elsewhere."""
    length = scores.shape[-1]
    index, first = torch.arange(length, device=scores.device), first[:, None, None]
    real, sink = index >= first, index < first + sinks
    z = scores.masked_fill(~real | sink, -torch.inf)
    if support is not None and support < length:
        z = z.masked_fill(rank_scores(z.detach()) <= length - support, -torch.inf)
    selected = sparsek(z, k) if soft else (z > -torch.inf).to(z.dtype)
    whole = sink | (length - first <= sinks + window + k)
    return selected.masked_fill(real & whole, 1.0)


@dataclass(frozen=True)
class _Bidirectional:
    """A query at position i has the keys from `i - left` to `i + right` in its window."""

    tile: int
    left: int
    right: int

    def blocks(self, scores: Tensor, limit: Tensor | None, tables: tuple[Tensor, ...], group: int) -> Iterator[Block]:
        """The shared keys and those around every tile, in this order; `scores` are gates here."""
        shared, first = tables
        batch, heads, length = scores.shape
        row = flat_rows(batch, heads, length, scores.device)
        first = first.view(batch, 1, 1, 1)
        common = shared.unsqueeze(-2)  # [B, Hkv, 1, G]
        gate = scores.flatten()[common + row]
        around = torch.arange(-self.left, self.tile + self.right, device=scores.device)
        width = common.shape[-1] + len(around)
        logits = batch * heads * group * self.tile * width
        for span in spans(length, length, self.tile, logits, scores.device):
            lead = (batch, heads, len(span.position))
            at = span.position[..., None]  # [n, tile, 1]
            near = self._in_window(common.unsqueeze(-2), at)  # [B, Hkv, n, tile, G]
            there = (gate > 0).unsqueeze(-2)
            free = there & ~near
            known = torch.where(near & there, 1.0, gate.unsqueeze(-2))

            band = span.position[:, :1] + around  # [n, tile - 1 + window]
            exists = (band >= first) & (band < length)
            band = band.clamp(0, length - 1).expand(*lead, -1)
            # What all queries have already counts once.
            new = exists & (scores.flatten()[band + row] == 0)
            local = self._in_window(band.unsqueeze(-2), at) & new.unsqueeze(-2)
            yield Block(
                span.rows,
                torch.cat([common.expand(*lead, -1), band], -1) + row,
                torch.cat([known, local.to(known.dtype)], -1),
                free,
                slice(0, common.shape[-1]),
            )

    def _in_window(self, key: Tensor, at: Tensor) -> Tensor:
        return (key >= at - self.left) & (key <= at + self.right)
