"""Compute causal SparseK attention in linear time, by the keys that a tile of queries reaches.

The selected set of query t + 1 is a subset of that of t plus the newest eligible key, so a tile of `C` consecutive
queries needs at most

    sinks  +  the best `size` keys of its first query  +  C - 1 keys that leave the window inside the tile  +  window

whatever the length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.thresholds import scan_prefixes
from hf_sparse.ops.selection.tiled import Span, TileBlock, attend_tiled, flat_rows, spans

# Queries per tile. The scan goes from tile to tile, so a GPU wants few of them.
_TILE = {"cpu": 64, "cuda": 1024}


def causal_sparsek_attention(problem: Problem, tile: int | None = None) -> Tensor:
    """Solve a causal problem tile by tile; returns `[B, Hq, Tq, D]` as `sparsek_attention`.

    Args:
        problem: tensors and settings of the call.
        tile: queries per tile, for tests and benchmarks; by default what suits the device.
    """
    query, scores = problem.query, problem.scores
    queries, keys = query.shape[2], problem.key.shape[2]
    tile = min(tile or _TILE.get(query.device.type, 128), max(1, queries))
    first = problem.first
    # Padding and sinks are no candidates.
    fixed = torch.arange(keys, device=query.device) < first[:, None, None] + problem.sinks
    result = scan_prefixes(
        scores.masked_fill(fixed, -torch.inf),
        problem.k,
        size=keys if problem.support is None else min(problem.support, keys),
        queries=queries,
        window=problem.window,
        tile=tile,
        with_tau=problem.soft,
        with_lists=True,
    )
    reach = _Causal(queries, tile, problem.window, problem.sinks)
    tables = (result.rank, result.floor, result.lists, first)
    return attend_tiled(
        query, problem.key, problem.value, problem.trained_scores, result.tau, tables, reach, problem.scaling
    )


@dataclass(frozen=True)
class _Causal:
    queries: int
    tile: int
    window: int
    sinks: int

    def blocks(
        self, scores: Tensor, limit: Tensor | None, tables: tuple[Tensor, ...], group: int
    ) -> Iterator[TileBlock]:
        """Yield the sinks, the candidates and the window of every tile, in this order."""
        rank, floor, lists, first = tables
        batch, heads, keys = scores.shape
        row = flat_rows(batch, heads, keys, scores.device)
        begin = first.view(batch, 1, 1, 1) + self.sinks
        sink = begin - self.sinks + torch.arange(self.sinks, device=scores.device)  # [B, 1, 1, sinks]
        width = self.sinks + lists.shape[-1] + self.tile - 1 + self.window
        logits = batch * heads * group * self.tile * width
        for span in spans(self.queries, keys, self.tile, logits, scores.device):
            candidate, inside = self._candidates(span, lists, begin, keys)
            gate, free = self._gates(span, candidate, inside, scores, limit, rank, floor, row)
            position = span.position[..., None]  # [n, tile, 1]
            # No query of the tile has left these behind.
            window_key = span.position[:, -1:] + 1 - self.window + torch.arange(self.window, device=scores.device)
            sees = ((window_key >= begin) & (window_key < keys)).unsqueeze(-2) & (window_key.unsqueeze(-2) <= position)
            lead = (batch, heads, len(span.position))
            gates = [
                (sink.unsqueeze(-2) <= position).expand(*lead, -1, -1).to(gate.dtype),
                gate,
                sees.expand(*lead, -1, -1).to(gate.dtype),
            ]
            index = [sink.clamp(max=keys - 1), candidate, window_key.clamp(0, keys - 1)]
            yield TileBlock(
                span.rows,
                torch.cat([part.expand(*lead, -1) for part in index], -1) + row,
                torch.cat(gates, -1),
                free,
                slice(self.sinks, self.sinks + candidate.shape[-1]),
            )

    def _candidates(self, span: Span, lists: Tensor, begin: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """List the keys `[B, Hkv, n, c]` that some query of a tile may have selected, and whether each exists."""
        leaving = span.position[:, :-1] - self.window + 1  # [n, tile - 1], eligible from some query of the tile on
        chosen = lists[:, :, span.tiles]
        batch, heads = lists.shape[:2]
        candidate = torch.cat([chosen, leaving.expand(batch, heads, -1, -1)], -1).clamp(0, keys - 1)
        exists = (leaving >= begin) & (leaving < keys)
        return candidate, torch.cat([chosen >= 0, exists.expand(batch, heads, -1, -1)], -1)

    def _gates(
        self,
        span: Span,
        candidate: Tensor,
        inside: Tensor,
        scores: Tensor,
        limit: Tensor | None,
        rank: Tensor,
        floor: Tensor,
        row: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gates `[B, Hkv, n, tile, c]` of the candidates, and mark those strictly between 0 and 1."""
        key, inside = candidate.unsqueeze(-2), inside.unsqueeze(-2)
        position = span.position[..., None]
        old = key <= position - self.window
        recent = inside & ~old & (key <= position)
        reached = rank.flatten()[candidate + row].unsqueeze(-2)
        eligible = inside & old & (reached >= span.per_query(floor)) & (reached > 0)
        if limit is None:
            return (eligible | recent).to(scores.dtype), None
        tau = span.per_query(limit)  # float64: a float32 next to a large threshold would not do
        z = scores.flatten()[candidate + row].unsqueeze(-2).to(tau.dtype)
        # The comparisons of the threshold's own backward, so that both agree to the last bit on which keys are free.
        free = eligible & (z > tau) & (z - 1 < tau)
        return (z - tau).clamp(0, 1).masked_fill(~eligible, 0.0).to(scores.dtype) + recent, free
