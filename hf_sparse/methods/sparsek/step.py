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

from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.scorer import NO_SLOPES, LinearScorer, Scorer
from hf_sparse.ops.selection.ragged import offsets_of
from hf_sparse.ops.selection.slots import has_kernels
from hf_sparse.ops.triton import DTYPES, MOST_ROWS

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


def step_in_one_kernel(
    attention: "SparseKAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    valid: Tensor | None,
    cache: SparseKCacheLayer,
    scaling: float,
) -> Tensor | None:
    """Score the new token of each row, give it a slot and attend to the slots.

    Args:
        query, key, value, hidden_states, valid, scaling: see `SparseAttentionLayer.attend`, for one token.

    Returns:
        `[B, Hq, 1, D]`, contiguous; `None`, with nothing changed, if the step has to take another path: it is being
        compiled or differentiated, the cache is empty or of another adapter, or no kernel takes what came.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_on_current_device(query):
        return None
    if attention.baseline is not None or attention.observer is not None:
        return None
    name = attention.active
    if cache.empty or cache.soft or not cache.uncounted or cache.owner != (attention.identities[name], None):
        return None
    scorer: Any = attention.sparsek_scorer[name]
    linear = isinstance(scorer, LinearScorer)
    weight, slope = (scorer.weight, scorer.slope) if linear else (None, None)  # others hand over their scores
    layout = (
        query.shape, key.shape, value.shape, hidden_states.shape,
        query.stride(), key.stride(), value.stride(), hidden_states.stride(),
        query.dtype, key.dtype, value.dtype, hidden_states.dtype,
        None if weight is None else (weight.dtype, weight.stride()), None if slope is None else slope.dtype,
        scorer.slopes, scaling, valid is None,
    )  # fmt: skip
    plan = cache.step
    if plan is None or plan.keys is not cache.keys or plan.scorer is not scorer or plan.layout != layout:
        kernel = _kernel(cache, query, key, value, hidden_states, valid, scorer, scaling)
        plan = cache.step = StepPlan(kernel, cache.keys, scorer, layout)
    if plan.kernel is None:
        return None
    states = hidden_states if linear else scorer(hidden_states, cache.seen[:, None])
    output = plan.kernel(query, key, value, states, weight, slope, valid)
    cache.uncounted = 0
    return output


def _is_on_current_device(query: Tensor) -> bool:
    """Tell whether a tensor is one of CUDA's current device, where Triton launches."""
    return query.is_cuda and type(query) is Tensor and query.device.index == torch.cuda.current_device()


def _kernel(
    cache: SparseKCacheLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    valid: Tensor | None,
    scorer: Any,
    scaling: float,
) -> "StepKernel | None":
    """Make the kernel of a layer's steps; `None` if it does not take what came."""
    tensors, tables = (query, key, value, hidden_states), (cache.scores, cache.positions)
    linear = isinstance(scorer, LinearScorer)
    weight, slope = (scorer.weight, scorer.slope) if linear else (None, None)
    parameters = [parameter for parameter in (weight, slope) if parameter is not None]
    fits_kernel = (
        has_kernels(cache.keys, cache.values, *tables)
        and cache.values.shape == cache.keys.shape
        and query.dtype == key.dtype == value.dtype == cache.keys.dtype == cache.values.dtype
        and all(tensor.device == query.device for tensor in (*parameters, *tensors, *tables))
        and all(tensor.stride(-1) == 1 for tensor in tensors)
        and all(parameter.dtype in DTYPES and parameter.is_contiguous() for parameter in parameters)
        and hidden_states.dtype in DTYPES
    )
    if not fits_kernel:
        return None
    from hf_sparse.ops.selection.triton.step import StepKernel

    state = (*(cache.keys, cache.values), *tables, cache.seen, cache.padded_late, cache.cumulative_length)
    return StepKernel(
        state,
        query,
        key,
        value,
        weight,
        slope,
        slopes=scorer.slopes if linear else NO_SLOPES,
        masked=valid is not None,
        window=cache.window,
        sinks=cache.sinks,
        scaling=scaling,
        counts=cache.counts,
        offsets=cache.offsets,
    )


def step_in_rows(
    attention: "SparseKAttention",
    states: Sequence[Tensor],
    rows: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    scaling: float,
) -> Tensor | None:
    """Take a decoding step with slots that lie in rows of a pool, without copying them.

    The kernels of the pool are kept with the attention, one for each number of requests and each budget. They share
    their memory.

    Args:
        states: positions, seen, scores, keys and values `[rows, ...]`, see `methods.sparsek.rows`.
        rows: `[B]` of integers, the row of each request.
        query, key, value, hidden_states, scaling: see `SparseAttentionLayer.attend`, for one token.

    Returns:
        `[B, Hq, 1, D]`; `None`, with nothing changed, if no kernel takes what came.
    """
    if attention.baseline is not None or not _is_on_current_device(query):
        return None
    scorer: Any = attention.sparsek_scorer[attention.active]
    linear = isinstance(scorer, LinearScorer)
    weight, slope = (scorer.weight, scorer.slope) if linear else (None, None)
    tensors = (query, key, value, hidden_states)
    layout = (
        *(tensor.shape for tensor in tensors), *(tensor.stride() for tensor in tensors),
        *(tensor.dtype for tensor in tensors), *(state.data_ptr() for state in states),
        states[3].shape, states[3].stride(), scorer, None if weight is None else weight.dtype,
        scorer.slopes, attention.budget, scaling,
    )  # fmt: skip
    if layout not in attention.row_kernels:
        attention.row_kernels[layout] = _kernel_of_rows(attention, states, tensors, scorer, scaling)
    kernel = attention.row_kernels[layout]
    if kernel is None:
        return None
    if not linear:
        hidden_states = scorer(hidden_states, states[1].index_select(0, rows.clamp(min=0)))
    pool = states[3], states[4], states[2], states[0], states[1]
    return kernel(query, key, value, hidden_states, weight, slope, None, rows, pool)


def _kernel_of_rows(
    attention: "SparseKAttention",
    states: Sequence[Tensor],
    tensors: Sequence[Tensor],
    scorer: Any,
    scaling: float,
) -> "StepKernel | None":
    """Make the kernel of the steps of a pool; `None` if it does not take what came."""
    positions, seen, scores, keys, values = states
    query, key, value, hidden_states = tensors
    linear = isinstance(scorer, LinearScorer)
    weight, slope = (scorer.weight, scorer.slope) if linear else (None, None)
    parameters = [parameter for parameter in (weight, slope) if parameter is not None]
    fits_kernel = (
        has_kernels(keys[0], *(state[0] for state in states))  # dense from the second dimension on
        and query.shape[0] <= MOST_ROWS
        and query.dtype == key.dtype == value.dtype == keys.dtype
        and all(tensor.stride(-1) == 1 for tensor in tensors)
        and all(parameter.dtype in DTYPES and parameter.is_contiguous() for parameter in parameters)
        and hidden_states.dtype in DTYPES
    )
    if not fits_kernel:
        return None
    from hf_sparse.ops.selection.triton.step import StepKernel, scratch_of_rows

    if attention.row_scratch is None:
        attention.row_scratch = scratch_of_rows(query.shape[1], key.shape[1], keys.shape[-1], keys.device)
    budget, counts, offsets = attention.budget, None, None
    if not isinstance(budget.k, int):
        counts = [budget.of_head(head).slots for head in range(len(budget.k))]
        offsets = offsets_of(counts, keys.device)
    return StepKernel(
        (keys, values, scores, positions, seen),
        query,
        key,
        value,
        weight,
        slope,
        slopes=scorer.slopes if linear else NO_SLOPES,
        masked=False,
        window=budget.window,
        sinks=budget.sinks,
        scaling=scaling,
        indexed=True,
        counts=counts,
        offsets=offsets,
        scratch=attention.row_scratch,
    )
