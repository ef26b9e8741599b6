"""Compile what the first call of `generate` will launch, for all layers side by side.

Layers whose heads have other numbers of slots launch other kernels, and decoding steps others than a prompt. Each would
be compiled when its layer, or the first step, is there: one after another.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse.core.generation import Generation
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.scorer import Linear
from hf_sparse.ops.triton import DTYPES, MOST_ROWS, cores, installed, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention

# On which kernels of steps are compiled beside those of the prompt; on fewer the first token would wait for all.
_ENOUGH_CORES = 8
_META = torch.device("meta")


class StepKind(NamedTuple):
    """Hold what the kernels of the steps of two layers may differ in; tensors are meta tensors.

    Attributes:
        budget: of the layer.
        linear: of the scorer, see `Scorer.linear`.
    """

    budget: Budget
    linear: Linear


@contextmanager
def steps_begun(generation: Generation, new: NewTokens) -> Iterator[None]:
    """Compile the steps of a call in the background, beside the prompt that a `with` block reads, or after it.

    Args:
        generation: the call.
        new: the prompt in one of the layers.
    """
    has_cores = cores() >= _ENOUGH_CORES
    if has_cores:
        _begin_steps(generation, new)
    yield
    if not has_cores:
        _begin_steps(generation, new)


def _begin_steps(generation: Generation, new: NewTokens) -> None:
    """Compile in the background the kernels of the steps that follow a prompt, those of all layers.

    Args:
        generation: what follows the prompt.
        new: the prompt in one of the layers; no step is expected that the kernels do not take.
    """
    query, key, value, states, _, scaling = new
    takes = query.dtype in DTYPES and query.dtype == key.dtype == value.dtype and states.dtype in DTYPES
    fits = query.shape[3] == key.shape[3] == value.shape[3] <= 256 and len(query) <= MOST_ROWS
    if not generation.has_steps or not takes or not fits or not installed() or not is_on_gpu(query):
        return
    from hf_sparse.ops.selection.triton import step

    rows = len(query)
    token = [torch.empty((rows, x.shape[1], 1, x.shape[3]), dtype=x.dtype, device=_META) for x in (query, key, value)]
    token.append(torch.empty((rows, 1, states.shape[2]), dtype=states.dtype, device=_META))
    kinds = step_kinds(layers_like(generation), key.shape[1])
    if kinds:
        is_masked = generation.is_masked
        step.begin_steps(lambda: [take_step(kind, token, scaling, is_masked) for kind in kinds], query.device)


def layers_like(generation: Generation) -> "list[SparseKAttention]":
    """Return the layers of a model whose keys a scorer chooses, as the layer that asks does."""
    layers: Sequence[Any] = generation.layers  # of a method that takes announcements, and a model has one method
    return [layer for layer in layers if layer.is_active and layer.uses_scorer]


def step_kinds(layers: "Iterable[SparseKAttention]", heads: int) -> list[StepKind]:
    """Return the kinds of steps of layers with so many KV heads, each once."""
    kinds: dict[object, StepKind] = {}
    for layer in layers:
        if layer.num_key_value_heads == heads:
            scorer: Any = layer.sparsek_scorer[layer.active]
            weight, slope, slopes = scorer.linear
            empty = [None if x is None else torch.empty_like(x, device=_META) for x in (weight, slope)]
            kind = StepKind(layer.budget, (empty[0], empty[1], slopes))
            layout = [None if x is None else (x.shape, x.dtype) for x in empty]
            kinds.setdefault((layer.budget, slopes, *layout), kind)
    return list(kinds.values())


def take_step(kind: StepKind, token: list[Tensor], scaling: float, is_masked: bool) -> Tensor:
    """Take a step with meta tensors.

    Args:
        kind: of the step.
        token: query, key and value `[B, H, 1, D]` of a new token, and the input of the attention module `[B, 1, C]`.
        scaling: multiplies the logits.
        is_masked: whether the step comes with a padding mask.

    Returns:
        `[B, Hq, 1, D]`, a meta tensor.
    """
    from hf_sparse.ops.selection.triton.step import StepKernel

    query, key, value, states = token
    rows, heads, _, dim = key.shape
    (k, window, sinks), (weight, slope, slopes) = kind.budget, kind.linear
    counts = None if isinstance(k, int) else [count + window + sinks for count in k]
    shape = (rows, heads, kind.budget.slots) if counts is None else (rows, sum(counts))
    sizes = (
        ((*shape, dim), key.dtype), ((*shape, dim), key.dtype), (shape, torch.float32), (shape, torch.int64),
        ((rows,), torch.int64), ((rows,), torch.bool), ((), torch.int64),
    )  # fmt: skip
    slots = [torch.empty(size, dtype=dtype, device=_META) for size, dtype in sizes]
    kernel = StepKernel(
        slots, query, key, value, weight, slope, slopes=slopes, masked=is_masked, window=window, sinks=sinks,
        scaling=scaling, counts=counts,
        offsets=None if counts is None else torch.empty(heads + 1, dtype=torch.int32, device=_META),
    )  # fmt: skip
    if weight is None:
        states = torch.empty((rows, heads, 1), dtype=torch.float32, device=_META)
    valid = torch.empty((rows, 1), dtype=torch.bool, device=_META) if is_masked else None
    return kernel(query, key, value, states, weight, slope, valid)
