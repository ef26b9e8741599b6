"""Compute SparseK attention in plain PyTorch: gather the keys that a tile of queries can reach, then attend densely.

A `Reach` (of `causal` or `bidirectional`) finds these keys and their gates. The number of keys that a tile reaches does
not grow with the length, so time is linear in the length. The backward recomputes the tile instead of storing it:
memory is linear too. Everything is float32 inside (float64 for float64). With e = exp(logit) / Z and P = gate * e,

    d gate = e * (<do, v> - delta),   d logit = P * (<do, v> - delta),   delta = <do, o>

which stays finite as a gate goes to 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Logits held at once. Small buffers stay in the caches of a CPU; a GPU wants few launches.
_BUFFER = {"cpu": 1 << 21, "cuda": 1 << 27}


@dataclass(frozen=True)
class TileBlock:
    """Hold `n` consecutive tiles of queries with the `S` keys that each can reach.

    The gate of a free key is `score - limit`, with the scores `[B, Hkv, Tk]` and limits `[B, Hkv, Tq]` (0 if there are
    none) that `attend_tiled` was given. All others are constant.
    """

    rows: slice  # the queries
    index: Tensor  # [B, Hkv, n, S] int64, flat indices into [B * Hkv * Tk]
    gate: Tensor  # [B, Hkv, n, tile, S]
    free: Tensor | None  # [B, Hkv, n, tile, c] bool, of the candidates only; None if no gate is trained
    candidates: slice  # where the candidates stand in S


class Reach(Protocol):
    """Find the keys that tiles of queries reach; all tensors come as arguments, so that autograd can hold them."""

    @property
    def tile(self) -> int:
        """Return the queries per tile."""

    def blocks(
        self, scores: Tensor, limit: Tensor | None, tables: tuple[Tensor, ...], group: int
    ) -> Iterator[TileBlock]:
        """Yield all queries, block by block; `group` is the number of query heads per KV head."""


def attend_tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    limit: Tensor | None,
    tables: tuple[Tensor, ...],
    reach: Reach,
    scaling: float,
) -> Tensor:
    """Attend tile by tile, `[B, Hq, Tq, D]`; a query without a key gets 0.

    Args:
        query, key, value: as in `sparsek_attention`.
        scores, limit: differentiable, see `TileBlock`.
        tables: integers that `reach` needs.
    """
    return _Tiled.apply(query, key, value, scores, limit, reach, scaling, *tables)


@dataclass(frozen=True)
class Span:
    """Hold the extent of some consecutive tiles of queries."""

    tiles: slice
    rows: slice  # their queries that exist
    position: Tensor  # [n, tile] int64, of each query among the keys

    def per_query(self, table: Tensor) -> Tensor:
        """Cut a number per query, `[B, Hkv, Tq]`, into tiles `[B, Hkv, n, tile, 1]`, padded with zeros."""
        part = torch.nn.functional.pad(
            table[..., self.rows], (0, self.position.numel() - self.rows.stop + self.rows.start)
        )
        return part.unflatten(-1, self.position.shape).unsqueeze(-1)


def spans(queries: int, keys: int, tile: int, logits: int, device: torch.device) -> Iterator[Span]:
    """Cut the queries, the last ones of the keys, into groups of tiles whose logits fit into the buffer.

    Args:
        logits: number of logits of a tile.
    """
    tiles = -(-queries // tile)
    at_once = max(1, _BUFFER.get(device.type, 1 << 24) // logits)
    step = torch.arange(tile, device=device)
    for low in range(0, tiles, at_once):
        high = min(low + at_once, tiles)
        base = keys - queries + torch.arange(low, high, device=device) * tile
        yield Span(slice(low, high), slice(low * tile, min(high * tile, queries)), base[:, None] + step)


def flat_rows(batch: int, heads: int, keys: int, device: torch.device) -> Tensor:
    """Find where each row begins in a flattened `[B * Hkv * Tk]`: `[B, Hkv, 1, 1]`."""
    return (torch.arange(batch * heads, device=device) * keys).view(batch, heads, 1, 1)


def _tiles(tensor: Tensor, rows: slice, heads: int, tile: int) -> Tensor:
    """Cut the given rows of `[B, Hq, Tq, X]` into tiles `[B, Hkv, n, G, tile, X]`, padded with zeros."""
    part = tensor[:, :, rows]
    part = torch.nn.functional.pad(part, (0, 0, 0, -part.shape[2] % tile))
    batch, _, length, width = part.shape
    return part.view(batch, heads, -1, length // tile, tile, width).transpose(2, 3)


def _rows(tiles: Tensor, length: int) -> Tensor:
    """Undo `_tiles`: put tiles together into rows `[B, Hq, length, X]`."""
    batch, heads, n, group, tile, width = tiles.shape
    return tiles.transpose(2, 3).reshape(batch, heads * group, n * tile, width)[:, :, :length]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        limit: Tensor | None,
        reach: Reach,
        scaling: float,
        *tables: Tensor,
    ) -> Tensor:
        heads, dim = key.shape[1], key.shape[3]
        group = query.shape[1] // heads
        dtype = torch.promote_types(query.dtype, torch.float32)
        flat_key, flat_value = key.to(dtype).reshape(-1, dim), value.to(dtype).reshape(-1, dim)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
        for block in reach.blocks(scores, limit, tables, group):
            logits, gate = _logits(query, flat_key, block, heads, reach.tile, scaling)
            peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
            weight = logits.sub_(peak).exp_().mul_(gate)
            mass = weight.sum(-1, keepdim=True)
            mass = mass.masked_fill(mass == 0, 1.0)  # no key: a padded query, or one past the end
            out = _matmul(weight, flat_value[block.index]).div_(mass)
            length = block.rows.stop - block.rows.start
            output[:, :, block.rows] = _rows(out, length).to(output.dtype)
            lse[:, :, block.rows] = _rows(peak + mass.log(), length).squeeze(-1)
        ctx.save_for_backward(query, key, value, scores, limit, output, lse, *tables)  # type: ignore[arg-type]
        ctx.reach, ctx.scaling = reach, scaling  # type: ignore[attr-defined]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _Tiled._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, scores, limit, output, lse, *tables = ctx.saved_tensors  # type: ignore[attr-defined]
        reach: Reach = ctx.reach  # type: ignore[attr-defined]
        scaling: float = ctx.scaling  # type: ignore[attr-defined]
        want_query, want_key, want_value, want_scores, want_limit, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        heads, dim = key.shape[1], key.shape[3]
        group = query.shape[1] // heads
        dtype = lse.dtype
        flat_key, flat_value = key.to(dtype).reshape(-1, dim), value.to(dtype).reshape(-1, dim)
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format) if want_query else None
        d_key = torch.zeros(flat_key.shape, dtype=dtype, device=key.device) if want_key else None
        d_value = torch.zeros(flat_value.shape, dtype=dtype, device=key.device) if want_value else None
        d_scores = torch.zeros(scores.numel(), dtype=scores.dtype, device=key.device) if want_scores else None
        d_limit = torch.empty_like(limit) if want_limit else None
        delta = (grad.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)

        for block in reach.blocks(scores, limit, tuple(tables), group):
            length = block.rows.stop - block.rows.start
            logits, gate = _logits(query, flat_key, block, heads, reach.tile, scaling)
            log_mass = _tiles(lse.unsqueeze(-1), block.rows, heads, reach.tile)
            d_out = _tiles(grad, block.rows, heads, reach.tile).to(dtype)
            share = logits.sub_(log_mass).exp_()  # e
            credit = _matmul(d_out, flat_value[block.index].transpose(-1, -2))
            credit = credit.sub_(_tiles(delta, block.rows, heads, reach.tile))
            where = block.index.flatten()
            if d_value is not None:
                part = torch.einsum("bhngts,bhngtd->bhnsd", share * gate, d_out)
                d_value.index_add_(0, where, part.reshape(-1, dim))
            credit = credit.mul_(share)  # d gate
            if block.free is not None and d_scores is not None:
                candidates = block.candidates
                d_gate = (
                    credit[..., candidates].sum(3).masked_fill_(~block.free, 0.0)
                )  # summed over the group's query heads
                d_scores.index_add_(
                    0, block.index[..., candidates].flatten(), d_gate.sum(-2).flatten().to(scores.dtype)
                )
                if d_limit is not None:
                    d_limit[:, :, block.rows] = -d_gate.sum(-1).flatten(2)[..., :length].to(scores.dtype)
            d_logits = credit.mul_(gate).mul_(scaling)
            if d_query is not None:
                part = _matmul(d_logits, flat_key[block.index])
                d_query[:, :, block.rows] = _rows(part, length).to(query.dtype)
            if d_key is not None:
                queries = _tiles(query, block.rows, heads, reach.tile).to(dtype)
                part = torch.einsum("bhngts,bhngtd->bhnsd", d_logits, queries)
                d_key.index_add_(0, where, part.reshape(-1, dim))

        return (
            d_query,
            d_key.view(key.shape).to(key.dtype) if d_key is not None else None,
            d_value.view(value.shape).to(value.dtype) if d_value is not None else None,
            d_scores.view(scores.shape) if d_scores is not None else None,
            d_limit,
            *[None] * (2 + len(tables)),
        )


def _logits(
    query: Tensor, flat_key: Tensor, block: TileBlock, heads: int, tile: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute the logits `[B, Hkv, n, G, tile, S]`, `-inf` for a gate of 0, and the gates `[B, Hkv, n, 1, tile, S]`."""
    queries = _tiles(query, block.rows, heads, tile).to(flat_key.dtype)
    logits = _matmul(queries, flat_key[block.index].transpose(-1, -2)).mul_(scaling)
    gate = block.gate.unsqueeze(3).to(logits.dtype)
    return logits.masked_fill_(gate == 0, -torch.inf), gate


def _matmul(rows: Tensor, shared: Tensor) -> Tensor:
    """Multiply `[B, Hkv, n, G, tile, X]` by `[B, Hkv, n, X, Y]` without a copy of `shared` for each of G heads."""
    return (rows.flatten(3, 4) @ shared).unflatten(3, rows.shape[3:5])
