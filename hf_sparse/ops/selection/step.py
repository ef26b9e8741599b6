"""Take a decoding step over KV slots, scores included, as one operator that compiled code does not look into.

A graph of fewer nodes compiles sooner: scoring, the choice of a slot, attention and counting are one node for each
layer, and on a GPU one kernel, that of an eager step (`hf_sparse.ops.selection.triton.step`).

The operator writes to the slots and does not declare it: torch would rewrite a graph with declared writes into one
without, which takes longer to compile. That is safe as long as nothing else in a compiled step reads or writes the
slots, each layer calls the operator once, its result is used, and the slots stay where they are, at multiples of 16
bytes as torch allocates them. The one tensor that others may read, the count of tokens, is optional.
"""

from typing import Any

import torch
from torch import Tensor

from hf_sparse.ops.selection import ragged
from hf_sparse.ops.selection.linear_scores import Slopes, linear_scores, slope_positions
from hf_sparse.ops.selection.slots import attend_slots, has_kernels, insert_token
from hf_sparse.ops.triton import DTYPES


@torch.library.custom_op("hf_sparse::sparsek_step", mutates_args=())
def take_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    weight: Tensor | None,
    slope: Tensor | None,
    valid: Tensor | None,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    seen: Tensor,
    padded_late: Tensor,
    arrived: Tensor | None,
    total: Tensor | None,
    position_slope: float,
    slope_tokens: int,
    slope_length: int,
    window: int,
    sinks: int,
    scaling: float,
    offsets: Tensor | None = None,
) -> Tensor:
    """Take the step in one kernel, or in plain PyTorch.

    Args:
        query, key, value: `[B, Hq, 1, D]`, `[B, Hkv, 1, D]` twice.
        states: input of the attention module `[B, 1, C]`, or without a weight the scores `[B, Hkv, 1]`.
        weight, slope: of a linear scorer, `[Hkv, C]` and `[Hkv]`.
        valid: `[B, 1]` bool, rows whose token is real; `None` if all are.
        keys, values, scores, positions, seen, padded_late: of the cache layer, written in place.
        arrived: its counters for the kernel, `[B * Hkv + 1]` of zeros; `None` to make them.
        total: the layer's count of tokens, which grows by one; `None` to leave it.
        position_slope, slope_tokens, slope_length: see `ops.selection.linear_scores.Slopes`.
        window, sinks, scaling: see `StepKernel`.
        offsets: where heads have different numbers of slots, see `hf_sparse.ops.selection.ragged`.

    Returns:
        `[B, Hq, 1, D]`, contiguous.
    """
    counts = None if offsets is None else ragged.counts_of(offsets)
    tensors, parameters = (query, key, value, states), [tensor for tensor in (weight, slope) if tensor is not None]
    tables = [tensor for tensor in (scores, positions, seen, padded_late, arrived) if tensor is not None]
    takes_kernel = (
        has_kernels(keys, values, *tables)
        and values.shape == keys.shape
        and query.dtype == key.dtype == value.dtype == keys.dtype == values.dtype
        and all(tensor.stride(-1) == 1 for tensor in tensors[:3])
        and all(tensor.dtype in DTYPES and tensor.is_contiguous() for tensor in parameters)
        and states.dtype in DTYPES
    )
    if takes_kernel:
        from hf_sparse.ops.selection.triton.step import StepKernel

        count = torch.empty((), dtype=torch.int64, device=keys.device) if total is None else total
        kernel = StepKernel(
            (keys, values, scores, positions, seen, padded_late, count), query, key, value, weight, slope,
            slopes=Slopes(position_slope, slope_tokens, slope_length), masked=valid is not None, window=window,
            sinks=sinks, scaling=scaling, counts=counts, offsets=offsets, arrived=arrived,
        )  # fmt: skip
        return kernel(query, key, value, states.contiguous(), weight, slope, valid)
    new = states if weight is None else linear_scores(states, weight)
    per_token: float | Tensor = position_slope
    if slope is not None:
        per_token = per_token + slope.to(new.dtype)[:, None] / slope_tokens
    new = (new + slope_positions(seen, slope_length)[:, None, None].to(new.dtype) * per_token).float()
    real = None if valid is None else valid.flatten()
    if real is not None:
        padded_late.logical_or_(~real & (seen > 0))
    slots, token = (keys, values, scores, positions, seen), (key, value, new, real)
    of_heads = {} if counts is None else {"counts": counts, "offsets": offsets}
    insert: Any = insert_token if counts is None else ragged.insert_token
    insert(*slots, *token, **of_heads, window=window, sinks=sinks)
    seen.add_(1 if real is None else real.long())
    if total is not None:
        total.add_(1)
    attend: Any = attend_slots if counts is None else ragged.attend_slots
    return attend(query, keys, values, positions, **of_heads, scaling=scaling).contiguous()


@take_step.register_fake
def _(query: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.shape)
