"""Compute SparseK attention of an encoder in linear time, by the keys that a tile of queries reaches.

Nothing arrives late here, so there is one selection per row and KV head, for all its queries, and one gate per key. A
tile of `C` consecutive queries needs

    the keys whose gate is not 0, sinks included  +  C - 1 + window keys around it

whatever the length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.ops.selection.gates import shared_gates
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.tiled import TileBlock, attend_tiled, flat_rows, spans

# Queries per tile. Each tile gathers its own window, and most of that is shared by few of its queries.
_TILE = {"cpu": 64, "cuda": 128}


def bidirectional_sparsek_attention(problem: Problem, tile: int | None = None) -> Tensor:
    """Solve the problem of an encoder tile by tile; returns `[B, Hq, T, D]` as `sparsek_attention`.

    Args:
        problem: tensors and settings of the call.
        tile: queries per tile, for tests and benchmarks; by default what suits the device.
    """
    query, length, window = problem.query, problem.query.shape[2], problem.window
    tile = min(tile or _TILE.get(query.device.type, 128), max(1, length))
    gates = shared_gates(problem)
    reached = gates.detach() > 0
    width = int(reached.sum(-1).amax()) if reached.numel() else 0
    # In the order of positions; shorter lists go on with keys of gate 0.
    shared = reached.byte().argsort(dim=-1, descending=True, stable=True)[..., :width].contiguous()
    left, right = window // 2, window - 1 - window // 2
    reach = _Bidirectional(tile, min(left, length - 1), min(right, length - 1))
    tables = (shared, problem.first)
    return attend_tiled(query, problem.key, problem.value, gates, None, tables, reach, problem.scaling)


@dataclass(frozen=True)
class _Bidirectional:
    """Find the keys of tiles whose query at position i has the keys `i - left` to `i + right` in its window."""

    tile: int
    left: int
    right: int

    def blocks(
        self, scores: Tensor, limit: Tensor | None, tables: tuple[Tensor, ...], group: int
    ) -> Iterator[TileBlock]:
        """Yield the shared keys of every tile, and then those around it; `scores` are gates here."""
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
            position = span.position[..., None]  # [n, tile, 1]
            in_window = self._in_window(common.unsqueeze(-2), position)  # [B, Hkv, n, tile, G]
            selected = (gate > 0).unsqueeze(-2)
            free = selected & ~in_window
            known = torch.where(in_window & selected, 1.0, gate.unsqueeze(-2))

            band = span.position[:, :1] + around  # [n, tile - 1 + window]
            exists = (band >= first) & (band < length)
            band = band.clamp(0, length - 1).expand(*lead, -1)
            # A key that all queries share counts once.
            new = exists & (scores.flatten()[band + row] == 0)
            local = self._in_window(band.unsqueeze(-2), position) & new.unsqueeze(-2)
            yield TileBlock(
                span.rows,
                torch.cat([common.expand(*lead, -1), band], -1) + row,
                torch.cat([known, local.to(known.dtype)], -1),
                free,
                slice(0, common.shape[-1]),
            )

    def _in_window(self, key: Tensor, position: Tensor) -> Tensor:
        return (key >= position - self.left) & (key <= position + self.right)
