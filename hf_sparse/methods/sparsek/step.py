"""Run a decoding step of SparseK as one launch, where it runs eager on a GPU with the scores of a scorer.

All that does not change between two steps of a layer is decided once and kept in the cache layer: the checks of
shapes and dtypes, the compiled kernel, the memory that it needs. What a step compares is what could change without
notice: tensors that were replaced, the layout of the new token, the scorer in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.core.request_state import StateRows
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.scorer import Linear, Scorer
from hf_sparse.ops.selection.ragged import offsets_of
from hf_sparse.ops.selection.slots import has_kernels
from hf_sparse.ops.triton import DTYPES, MOST_ROWS, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.ops.selection.triton.step import StepKernel


@dataclass
class StepPlan:
    """Hold the kernel of a layer's decoding steps, and the tensors and layout that it was made for.

    Attributes:
        kernel: `None` if no kernel takes such a step.
        keys: keys of the cache layer; all tensors of a layer are replaced together.
        scorer: whose parameters the kernel reads.
        layout: shapes and strides of the new token and the parameters.
    """

    kernel: "StepKernel | None"
    keys: Tensor
    scorer: Scorer
    layout: tuple[Any, ...]


def step_in_one_kernel(attention: "SparseKAttention", new: NewTokens, cache: SparseKCacheLayer) -> Tensor | None:
    """Score the new token of each row, give it a slot and attend to the slots.

    Args:
        new: one token of each row.
        cache: takes in the tokens.

    Returns:
        `[B, Hq, 1, D]`, contiguous; `None`, with nothing changed, if the step has to take another path: it is being
        compiled or differentiated, the cache is empty or of another adapter, or no kernel takes what came.
    """
    query, key, value, hidden_states, valid, _ = new
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(query) is not Tensor or not is_on_gpu(query):
        return None
    name = attention.active
    if not attention.uses_scorer or cache.owner != (attention.identities[name], None):
        return None
    if cache.empty or cache.soft or not cache.uncounted:
        return None
    scorer: Any = attention.sparsek_scorer[name]
    linear = scorer.linear
    layout = (*_layout(linear, new), valid is None)
    plan = cache.step
    if plan is None or plan.keys is not cache.keys or plan.scorer is not scorer or plan.layout != layout:
        plan = cache.step = StepPlan(_kernel_of_cache(cache, new, scorer), cache.keys, scorer, layout)
    if plan.kernel is None:
        return None
    weight, slope, _ = linear
    states = scorer(hidden_states, cache.seen[:, None]) if weight is None else hidden_states
    output = plan.kernel(query, key, value, states, weight, slope, valid)
    cache.uncounted = 0
    return output


def step_in_rows(attention: "SparseKAttention", at: StateRows, new: NewTokens) -> Tensor | None:
    """Take a decoding step with slots that lie in rows of a pool, without copying them.

    The kernels of the pool are kept with the attention, one for each number of requests and each budget. They share
    their memory.

    Args:
        at: the rows of the requests, which are read and written; `at.sources` is not looked at.
        new: one token of each request, without padding.

    Returns:
        `[B, Hq, 1, D]`; `None`, with nothing changed, if no kernel takes what came.
    """
    query, key, value, hidden_states, _, _ = new
    if attention.baseline is not None or type(query) is not Tensor or not is_on_gpu(query):
        return None
    positions, seen, scores, keys, values = states = at.states
    scorer: Any = attention.sparsek_scorer[attention.active]
    linear = scorer.linear
    addresses = tuple([state.data_ptr() for state in states])
    layout = (*_layout(linear, new), addresses, keys.shape, keys.stride(), scorer, attention.budget)
    if layout not in attention.row_kernels:
        attention.row_kernels[layout] = _kernel_of_rows(attention, states, new, scorer)
    kernel = attention.row_kernels[layout]
    if kernel is None:
        return None
    weight, slope, _ = linear
    if weight is None:
        hidden_states = scorer(hidden_states, seen.index_select(0, at.rows.clamp(min=0)))
    pool = keys, values, scores, positions, seen
    return kernel(query, key, value, hidden_states, weight, slope, None, at.rows, pool)


def _layout(linear: Linear, new: NewTokens) -> tuple[Any, ...]:
    """Return what a kernel depends on of new tokens and of the parameters of their scorer."""
    query, key, value, hidden_states, _, scaling = new
    weight, slope, slopes = linear
    return (
        query.shape, key.shape, value.shape, hidden_states.shape,
        query.stride(), key.stride(), value.stride(), hidden_states.stride(),
        query.dtype, key.dtype, value.dtype, hidden_states.dtype,
        None if weight is None else (weight.dtype, weight.stride()), None if slope is None else slope.dtype,
        slopes, scaling,
    )  # fmt: skip


def _kernel_of_cache(cache: SparseKCacheLayer, new: NewTokens, scorer: Scorer) -> "StepKernel | None":
    """Make the kernel of a layer's steps; `None` if it does not take what came."""
    slots = cache.keys, cache.values, cache.scores, cache.positions
    if not has_kernels(*slots) or not _takes(new, scorer, *slots):
        return None
    return _kernel(
        (*slots, cache.seen, cache.padded_late, cache.cumulative_length), new, scorer,
        window=cache.window, sinks=cache.sinks, counts=cache.counts, offsets=cache.offsets,
    )  # fmt: skip


def _kernel_of_rows(
    attention: "SparseKAttention", states: Sequence[Tensor], new: NewTokens, scorer: Scorer
) -> "StepKernel | None":
    """Make the kernel of the steps of a pool; `None` if it does not take what came."""
    positions, seen, scores, keys, values = states
    query, key = new.query, new.key
    is_dense = has_kernels(keys[0], *(state[0] for state in states))  # from the second dimension on
    if not is_dense or len(query) > MOST_ROWS or not _takes(new, scorer, keys, values):
        return None
    from hf_sparse.ops.selection.triton.step import scratch_of_rows

    if attention.row_scratch is None:
        attention.row_scratch = scratch_of_rows(query.shape[1], key.shape[1], keys.shape[-1], keys.device)
    budget, counts, offsets = attention.budget, None, None
    if not isinstance(budget.k, int):
        counts = [budget.of_head(head).slots for head in range(len(budget.k))]
        offsets = offsets_of(counts, keys.device)
    return _kernel(
        (keys, values, scores, positions, seen), new, scorer, window=budget.window, sinks=budget.sinks,
        indexed=True, counts=counts, offsets=offsets, scratch=attention.row_scratch,
    )  # fmt: skip


def _takes(new: NewTokens, scorer: Scorer, keys: Tensor, values: Tensor, *tables: Tensor) -> bool:
    """Tell whether the kernel takes new tokens and parameters beside slots for which there are kernels."""
    query, key, value, hidden_states, _, _ = new
    token = query, key, value, hidden_states
    weight, slope, _ = scorer.linear
    parameters = [parameter for parameter in (weight, slope) if parameter is not None]
    return (
        values.shape == keys.shape
        and query.dtype == key.dtype == value.dtype == keys.dtype == values.dtype
        and all(tensor.device == query.device for tensor in (*parameters, *token, *tables))
        and all(tensor.stride(-1) == 1 for tensor in token)
        and all(parameter.dtype in DTYPES and parameter.is_contiguous() for parameter in parameters)
        and hidden_states.dtype in DTYPES
    )


def _kernel(slots: tuple[Tensor, ...], new: NewTokens, scorer: Scorer, **settings: Any) -> "StepKernel":
    """Make the kernel of steps; see `StepKernel` for slots and settings."""
    from hf_sparse.ops.selection.triton.step import StepKernel

    weight, slope, slopes = scorer.linear
    settings |= {"scaling": new.scaling, "masked": new.valid is not None}
    return StepKernel(slots, new.query, new.key, new.value, weight, slope, slopes=slopes, **settings)
