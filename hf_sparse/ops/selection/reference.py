"""Compute the reference: every mask written out as its definition says, `Tq x Tk`. Slow, obvious, differentiable."""

import torch
from torch import Tensor

from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.projection import sparsek


def dense_sparsek_attention(problem: Problem) -> Tensor:
    """Solve a problem by its definition; returns `[B, Hq, Tq, D]` as `sparsek_attention`."""
    query, key, value, scores = problem.query, problem.key, problem.value, problem.scores
    k, window, sinks, support = problem.k, problem.window, problem.sinks, problem.support
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    position = torch.arange(keys - queries, keys, device=query.device)[:, None]  # [Tq, 1]
    index = torch.arange(keys, device=query.device)  # [Tk]
    first = problem.first[:, None, None, None]  # [B, 1, 1, 1]

    sink = index < first + sinks
    if problem.causal:
        exists = (index >= first) & (index <= position)
        always = exists & ((index > position - window) | sink)
        eligible = exists & ~always  # [B, 1, Tq, Tk]
    else:
        exists = (index >= first).expand(-1, -1, queries, -1)
        begin = position - window // 2
        fits = keys - first <= sinks + window + k
        always = exists & (((index >= begin) & (index < begin + window)) | sink | fits)
        eligible = exists & ~sink

    scored = scores[:, :, None].masked_fill(~eligible, -torch.inf)  # [B, Hkv, Tq, Tk]
    if support is not None:
        order = scored.detach().argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(-1, order, index.expand_as(order))
        scored = scored.masked_fill(place >= support, -torch.inf)
    gate = sparsek(scored, k) if problem.soft else (scored > -torch.inf).to(scored.dtype)
    gate = torch.where(always, torch.ones_like(gate), gate)

    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).view(batch, kv_heads, heads // kv_heads, queries, dim)
    logits = grouped @ key.to(dtype)[:, :, None].transpose(-1, -2) * problem.scaling
    gate = gate[:, :, None].to(dtype)
    logits = logits.masked_fill(gate == 0, -torch.inf)
    weight = gate * torch.exp(logits - logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min))
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return (weight @ value.to(dtype)[:, :, None]).view(batch, heads, queries, dim).to(query.dtype)
