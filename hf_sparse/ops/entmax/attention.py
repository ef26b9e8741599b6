"""Compute entmax attention of folded queries and keys block by block; the backward recomputes each block.

With u = [z - tau]_+, e = 1 / (alpha - 1), p = u ** e and U = u ** (e - 1), and dp = <do, v>:

    dz = e U (dp - delta),   delta = sum(U dp) / sum(U),   de = sum(p log u (dp - delta))

Everything outside the support drops out. Peters et al. 2019 (arXiv 1905.05702) for dz; the form for e is ours and
equals that of Correia et al. 2019 (arXiv 1909.00015) for alpha.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.ops.entmax.blocks import JobBlock, Plan
from hf_sparse.ops.entmax.inputs import Inputs
from hf_sparse.ops.entmax.threshold import powers, relative_threshold


def attend(inputs: Inputs, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `[B, Hq, Tq, D]`, tau `[B, Hq, Tq]` and the size of the support `[B, Hq, Tq]` int64.

    tau is that of z = (alpha - 1) * logit, `-inf` for a query without a key, whose output is 0.
    """
    layout = plan.layout
    exponent = inputs.exponent
    trained = exponent if isinstance(exponent, Tensor) else None
    with torch.autocast(value.device.type, enabled=False):
        output, tau, count = _EntmaxAttention.apply(
            layout.fold_queries(inputs.query),
            layout.fold_keys(inputs.key),
            layout.fold_keys(value.to(inputs.key.dtype)),
            trained,
            None if isinstance(exponent, Tensor) else exponent,
            plan,
        )
    tau, count = (layout.unfold_queries(part).squeeze(-1) for part in (tau, count))
    return layout.unfold_queries(output), tau, count


@torch.no_grad()
def entmax_thresholds(inputs: Inputs, plan: Plan) -> Tensor:
    """Compute tau `[B, Hq, Tq]` over the keys of the plan: a lower bound of the tau over more keys."""
    layout = plan.layout
    query, key = layout.fold_queries(inputs.query), layout.fold_keys(inputs.key)
    tau = query.new_full((*query.shape[:2], 1), -torch.inf)
    with torch.autocast(query.device.type, enabled=False):
        for block in plan.blocks(query.device):
            z, peak = _scores(query, key, block)
            tau[block.jobs] = _absolute(relative_threshold(z, _exponent(inputs.exponent, plan, block)), peak)
    return layout.unfold_queries(tau).squeeze(-1)


def _scores(query: Tensor, key: Tensor, block: JobBlock) -> tuple[Tensor, Tensor]:
    """Compute z less its maximum, `[n, share, rows, S]`, and the maximum, `[n, share, rows, 1]`.

    A key that the query does not see has `-inf`."""
    z = query[block.jobs] @ key[block.tiles].flatten(1, 2).transpose(-1, -2)
    z = z.unflatten(1, (-1, block.seen.shape[2])).masked_fill_(~block.seen, -torch.inf)
    peak = z.amax(-1, keepdim=True)
    return z.sub_(peak.clamp(min=torch.finfo(z.dtype).min)), peak


def _absolute(tau: Tensor, peak: Tensor) -> Tensor:
    return (tau + peak).flatten(1, 2)


def _exponent(exponent: float | Tensor, plan: Plan, block: JobBlock) -> float | Tensor:
    return plan.layout.per_head(exponent, block.jobs) if isinstance(exponent, Tensor) else exponent


class _EntmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        trained: Tensor | None,
        fixed: float | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exponents: float | Tensor = trained if trained is not None else fixed  # type: ignore[assignment]
        lead = query.shape[:2]
        output = query.new_zeros((*lead, value.shape[-1]))
        relative = query.new_zeros((*lead, 1))
        tau = query.new_full((*lead, 1), -torch.inf)
        count = torch.zeros((*lead, 1), dtype=torch.int64, device=query.device)
        for block in plan.blocks(query.device):
            exponent = _exponent(exponents, plan, block)
            z, peak = _scores(query, key, block)
            threshold = relative_threshold(z, exponent)
            weight, _ = powers(z.sub_(threshold).clamp_(min=0), exponent)
            mass = weight.sum(-1, keepdim=True)
            share = (weight / mass.masked_fill(mass == 0, 1.0)).flatten(1, 2)
            output[block.jobs] = share @ value[block.tiles].flatten(1, 2)
            relative[block.jobs] = threshold.flatten(1, 2)
            tau[block.jobs] = _absolute(threshold, peak)
            count[block.jobs] = (weight > 0).sum(-1, keepdim=True).flatten(1, 2)
        ctx.save_for_backward(query, key, value, trained, relative)  # type: ignore[arg-type]
        ctx.fixed, ctx.plan = fixed, plan  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(tau, count)
        return output, tau, count

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _EntmaxAttention._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, trained, relative = ctx.saved_tensors  # type: ignore[attr-defined]
        plan: Plan = ctx.plan  # type: ignore[attr-defined]
        exponents: float | Tensor = trained if trained is not None else ctx.fixed  # type: ignore[attr-defined]
        wants = ctx.needs_input_grad  # type: ignore[attr-defined]
        d_query, d_key, d_value = (
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in zip((query, key, value), wants[:3], strict=True)
        )
        d_exponent = torch.zeros_like(trained).view(plan.layout.heads, -1) if wants[3] else None
        for block in plan.blocks(query.device):
            exponent = _exponent(exponents, plan, block)
            z, _ = _scores(query, key, block)
            excess = z.sub_(relative[block.jobs].view(*z.shape[:3], 1)).clamp_(min=0)
            weight, slope = powers(excess, exponent)
            d_out, where = grad[block.jobs], block.tiles.flatten()
            credit = (d_out @ value[block.tiles].flatten(1, 2).transpose(-1, -2)).view_as(weight)
            total = slope.sum(-1, keepdim=True)
            delta = (slope * credit).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
            credit = credit.sub_(delta)
            if d_value is not None:
                mass = weight.sum(-1, keepdim=True)
                share = (weight / mass.masked_fill(mass == 0, 1.0)).flatten(1, 2)
                _add(d_value, where, share.transpose(-1, -2) @ d_out)
            if d_exponent is not None:
                part = (torch.xlogy(weight, excess) * credit).sum((-1, -2))
                d_exponent.index_add_(0, plan.layout.list_of(block.jobs), part)
            d_z = (credit.mul_(slope) * exponent).flatten(1, 2)
            if d_query is not None:
                d_query[block.jobs] = d_z @ key[block.tiles].flatten(1, 2)
            if d_key is not None:
                _add(d_key, where, d_z.transpose(-1, -2) @ query[block.jobs])
        return d_query, d_key, d_value, None if d_exponent is None else d_exponent.flatten(), None, None


def _add(total: Tensor, where: Tensor, part: Tensor) -> None:
    """Add `[n, c * size, X]` to the tiles `[., size, X]` that `where`, `[n * c]`, names."""
    total.index_add_(0, where, part.reshape(-1, *total.shape[1:]))
