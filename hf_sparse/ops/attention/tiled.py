"""Linear-time SparseK attention in plain PyTorch: gather the keys of a tile of queries, then dense maths on the tile.

The selected set of query t + 1 is a subset of that of t plus the newest eligible key, so a tile of `C` consecutive
queries needs at most

    sinks  +  the best `size` keys of its first query  +  C - 1 keys that leave the window inside the tile  +  window

whatever the length. The backward recomputes the tile instead of storing it: memory is linear too. Everything is float32
inside (float64 for float64). With e = exp(logit) / Z and P = gate * e,

    d gate = e * (<do, v> - delta),   d logit = P * (<do, v> - delta),   delta = <do, o>

which stays finite as a gate goes to 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.prefix import scan

# Queries per tile, and logits held at once. Small buffers stay in the caches of a CPU; a GPU wants few launches.
_TILE = {"cpu": 64, "cuda": 512}
_BUFFER = {"cpu": 1 << 21, "cuda": 1 << 27}


class _Plan(NamedTuple):
    window: int
    sinks: int
    scaling: float
    tile: int
    buffer: int


def tiled_sparsek_attention(
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
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    tile = tile or _TILE.get(query.device.type, 128)
    first = torch.zeros(batch, dtype=torch.int64, device=query.device) if start is None else start
    fixed = torch.arange(keys, device=query.device) < first[:, None, None] + sinks  # padding and sinks: no candidates
    found = scan(
        scores.masked_fill(fixed, -torch.inf),
        k,
        size=keys if support is None else min(support, keys),
        queries=queries,
        window=window,
        tile=tile,
        with_tau=soft,
        with_lists=True,
    )
    plan = _Plan(window, sinks, scaling, tile, _BUFFER.get(query.device.type, 1 << 24))
    return _Tiled.apply(query, key, value, scores, found.tau, found.rank, found.floor, found.lists, first, plan)


@dataclass(frozen=True)
class _Block:
    """Some consecutive tiles, `n` of them, with the `S` keys that each can reach."""

    rows: slice  # the queries
    index: Tensor  # [B, Hkv, n, S] int64, flat indices into [B * Hkv * Tk]
    gate: Tensor  # [B, Hkv, n, tile, S]
    free: Tensor | None  # [B, Hkv, n, tile, c] bool: gate strictly between 0 and 1; of the candidates only
    candidates: slice  # where the candidates stand in S


def _blocks(
    shape: torch.Size,
    group: int,
    queries: int,
    scores: Tensor,
    tau: Tensor | None,
    rank: Tensor,
    floor: Tensor,
    lists: Tensor,
    first: Tensor,
    plan: _Plan,
) -> Iterator[_Block]:
    batch, heads, keys, _ = shape
    window, sinks, _, tile, buffer = plan
    device = scores.device
    row = (torch.arange(batch * heads, device=device) * keys).view(batch, heads, 1, 1)
    step = torch.arange(tile, device=device)
    sink = (first[:, None] + torch.arange(sinks, device=device)).view(batch, 1, 1, sinks)
    begin = (first + sinks).view(batch, 1, 1, 1)
    width = sinks + lists.shape[-1] + tile - 1 + window
    tiles = lists.shape[2]
    at_once = max(1, buffer // (batch * heads * group * tile * width))
    zero = torch.zeros((), device=device, dtype=scores.dtype)

    def per_key(table: Tensor, index: Tensor) -> Tensor:
        return table.flatten()[index + row]

    for low in range(0, tiles, at_once):
        n = min(at_once, tiles - low)
        base = keys - queries + (low + torch.arange(n, device=device)) * tile  # position of each tile's first query
        position = base[:, None] + step  # [n, tile]
        at = position[..., None]
        rows = slice(low * tile, min((low + n) * tile, queries))
        pad = (low + n) * tile - rows.stop

        def per_query(table: Tensor, rows: slice = rows, pad: int = pad, n: int = n) -> Tensor:
            return torch.nn.functional.pad(table[..., rows], (0, pad)).view(batch, heads, n, tile, 1)

        leaving = base[:, None] - window + 1 + step[:-1]  # [n, tile - 1], eligible from some query of the tile on
        near = base[:, None] - window + tile + torch.arange(window, device=device)  # [n, window], never eligible
        chosen = lists[:, :, low : low + n]
        candidate = torch.cat([chosen, leaving.expand(batch, heads, -1, -1)], -1)
        inside = torch.cat([chosen >= 0, ((leaving >= begin) & (leaving < keys)).expand(batch, heads, -1, -1)], -1)
        candidate = candidate.clamp(0, keys - 1)

        j = candidate.unsqueeze(-2)
        eligible = inside.unsqueeze(-2) & (j <= at - window)
        recent = inside.unsqueeze(-2) & (j > at - window) & (j <= at)
        reached = per_key(rank, candidate).unsqueeze(-2)
        eligible &= (reached >= per_query(floor)) & (reached > 0)
        free = None
        if tau is None:
            gate = (eligible | recent).to(scores.dtype)
        else:
            z, limit = per_key(scores, candidate).unsqueeze(-2), per_query(tau)
            # The comparisons of the threshold's own backward, so that both agree on who is free to the last bit.
            free = eligible & (z > limit) & (z - 1 < limit)
            gate = torch.where(eligible, (z - limit).clamp(0, 1), zero) + recent

        sees = (near.clamp(0, keys - 1)[:, None] <= at) & (near < keys)[:, None] & (near >= begin)[..., None, :]
        # A padded query has no key at all: let it see the first sink, so that nothing is divided by 0.
        always = (sink[..., None, :] <= at) | (position < begin - sinks)[..., None]
        gate = torch.cat(
            [
                always.expand(batch, heads, n, tile, sinks).to(gate.dtype),
                gate,
                sees.expand(batch, heads, n, tile, window).to(gate.dtype),
            ],
            -1,
        )
        index = torch.cat(
            [
                sink.clamp(max=keys - 1).expand(batch, heads, n, sinks),
                candidate,
                near.clamp(0, keys - 1).expand(batch, heads, n, window),
            ],
            -1,
        )
        yield _Block(rows, index + row, gate, free, slice(sinks, sinks + candidate.shape[-1]))


def _tiles(tensor: Tensor, rows: slice, heads: int, tile: int) -> Tensor:
    """`[B, Hq, Tq, X]` -> `[B, Hkv, n, G, tile, X]` of the given rows, padded with zeros."""
    part = tensor[:, :, rows]
    part = torch.nn.functional.pad(part, (0, 0, 0, -part.shape[2] % tile))
    batch, _, length, width = part.shape
    return part.view(batch, heads, -1, length // tile, tile, width).transpose(2, 3)


def _rows(tiles: Tensor, length: int) -> Tensor:
    """The inverse of `_tiles`."""
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
        tau: Tensor | None,
        rank: Tensor,
        floor: Tensor,
        lists: Tensor,
        first: Tensor,
        plan: _Plan,
    ) -> Tensor:
        heads, dim = key.shape[1], key.shape[3]
        group = query.shape[1] // heads
        wide = torch.promote_types(query.dtype, torch.float32)
        flat_key, flat_value = key.to(wide).reshape(-1, dim), value.to(wide).reshape(-1, dim)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
        for block in _blocks(key.shape, group, query.shape[2], scores, tau, rank, floor, lists, first, plan):
            logits, gate = _logits(query, flat_key, block, heads, plan)
            peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
            weight = logits.sub_(peak).exp_().mul_(gate)
            mass = weight.sum(-1, keepdim=True)
            # A row of a tile that reaches past the sequence has no key.
            mass = mass.masked_fill(mass == 0, 1.0)
            out = _matmul(weight, flat_value[block.index]).div_(mass)
            length = block.rows.stop - block.rows.start
            output[:, :, block.rows] = _rows(out, length).to(output.dtype)
            lse[:, :, block.rows] = _rows(peak + mass.log(), length).squeeze(-1)
        ctx.save_for_backward(query, key, value, scores, tau, rank, floor, lists, first, output, lse)  # type: ignore[arg-type]
        ctx.plan = plan  # type: ignore[attr-defined]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _Tiled._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, scores, tau, rank, floor, lists, first, output, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        plan: _Plan = ctx.plan  # type: ignore[attr-defined]
        want_query, want_key, want_value, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        heads, dim = key.shape[1], key.shape[3]
        group = query.shape[1] // heads
        wide = lse.dtype
        flat_key, flat_value = key.to(wide).reshape(-1, dim), value.to(wide).reshape(-1, dim)
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format) if want_query else None
        d_key = torch.zeros(flat_key.shape, dtype=wide, device=key.device) if want_key else None
        d_value = torch.zeros(flat_value.shape, dtype=wide, device=key.device) if want_value else None
        d_scores = torch.zeros(scores.numel(), dtype=scores.dtype, device=key.device) if tau is not None else None
        d_tau = torch.empty_like(tau) if tau is not None else None
        delta = (grad.to(wide) * output.to(wide)).sum(-1, keepdim=True)

        for block in _blocks(key.shape, group, query.shape[2], scores, tau, rank, floor, lists, first, plan):
            length = block.rows.stop - block.rows.start
            logits, gate = _logits(query, flat_key, block, heads, plan)
            log_mass = _tiles(lse.unsqueeze(-1), block.rows, heads, plan.tile)
            d_out = _tiles(grad, block.rows, heads, plan.tile).to(wide)
            share = logits.sub_(log_mass).exp_()  # e
            credit = _matmul(d_out, flat_value[block.index].transpose(-1, -2))
            credit = credit.sub_(_tiles(delta, block.rows, heads, plan.tile))
            where = block.index.flatten()
            if d_value is not None:
                part = torch.einsum("bhngts,bhngtd->bhnsd", share * gate, d_out)
                d_value.index_add_(0, where, part.reshape(-1, dim))
            credit = credit.mul_(share)  # d gate
            if block.free is not None and d_scores is not None and d_tau is not None:
                at = block.candidates
                d_gate = credit[..., at].sum(3).masked_fill_(~block.free, 0.0)  # summed over the group's query heads
                d_scores.index_add_(0, block.index[..., at].flatten(), d_gate.sum(-2).flatten().to(scores.dtype))
                d_tau[:, :, block.rows] = -d_gate.sum(-1).flatten(2)[..., :length].to(scores.dtype)
            d_logits = credit.mul_(gate).mul_(plan.scaling)
            if d_query is not None:
                part = _matmul(d_logits, flat_key[block.index])
                d_query[:, :, block.rows] = _rows(part, length).to(query.dtype)
            if d_key is not None:
                queries = _tiles(query, block.rows, heads, plan.tile).to(wide)
                part = torch.einsum("bhngts,bhngtd->bhnsd", d_logits, queries)
                d_key.index_add_(0, where, part.reshape(-1, dim))

        return (
            d_query,
            d_key.view(key.shape).to(key.dtype) if d_key is not None else None,
            d_value.view(value.shape).to(value.dtype) if d_value is not None else None,
            d_scores.view(scores.shape) if d_scores is not None else None,
            d_tau,
            *[None] * 5,
        )


def _logits(query: Tensor, flat_key: Tensor, block: _Block, heads: int, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Logits `[B, Hkv, n, G, tile, S]`, `-inf` where the gate is 0, and the gates `[B, Hkv, n, 1, tile, S]`."""
    queries = _tiles(query, block.rows, heads, plan.tile).to(flat_key.dtype)
    logits = _matmul(queries, flat_key[block.index].transpose(-1, -2)).mul_(plan.scaling)
    gate = block.gate.unsqueeze(3).to(logits.dtype)
    return logits.masked_fill_(gate == 0, -torch.inf), gate


def _matmul(rows: Tensor, shared: Tensor) -> Tensor:
    """`[B, Hkv, n, G, tile, X] @ [B, Hkv, n, X, Y]`, without a copy of `shared` for each of the G query heads."""
    return (rows.flatten(3, 4) @ shared).unflatten(3, rows.shape[3:5])
