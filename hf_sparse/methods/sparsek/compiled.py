"""Attend within whole texts as an operator that compiled code calls and does not look into.

Traced, the loops over tiles would unroll into a graph of minutes, another one for every length, and the kernels choose
their programs by values. Without an operator the graph would break there, once in a layer. Compiled code keeps tensors
only between forward and backward, so the backward computes the attention again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse._compat import recorded_gradients
from hf_sparse.methods.sparsek.padded import attend_padded


def attend_compiled(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, valid: Tensor | None, **options: Any
) -> Tensor:
    """Call `sparsek_attention` for the rows of a batch, of which `valid` `[B, T]` marks the tokens that are real.

    Args:
        options: of `sparsek_attention`.
    """
    settings = {"gates": "hard", "support": None, **options}
    for name in ("k", "support"):  # operators take lists of numbers
        settings[name] = [settings[name]] if isinstance(settings[name], int) else settings[name]
    if settings["gates"] == "hard":
        scores = scores.detach()  # they get no gradient there, rather than one of 0
    return _attend(query, key, value, scores, valid, **settings).transpose(1, 2)


def _options(k: Sequence[int], support: Sequence[int] | None, **others: Any) -> dict[str, Any]:
    """Return the options of `sparsek_attention`, with a number of keys for all heads where a list has but one."""
    for name, numbers in (("k", k), ("support", support)):
        others[name] = numbers[0] if numbers is not None and len(numbers) == 1 else numbers
    return others


@torch.library.custom_op("hf_sparse::sparsek_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    *,
    k: Sequence[int],
    window: int,
    sinks: int,
    scaling: float,
    causal: bool,
    gates: str,
    support: Sequence[int] | None,
) -> Tensor:
    """Return `[B, T, Hq, D]`, which is how the layers of transformers go on."""
    options = _options(k, support, window=window, sinks=sinks, scaling=scaling, causal=causal, gates=gates)
    output = attend_padded(query, key, value, scores, valid, valid, **options)
    return output.transpose(1, 2).clone(memory_format=torch.contiguous_format)


@_attend.register_fake
def _(query: Tensor, *args: Any, **options: Any) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3]))


@torch.library.custom_op("hf_sparse::sparsek_attention_backward", mutates_args=())
def _differentiate(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    needed: Sequence[bool],
    *,
    k: Sequence[int],
    window: int,
    sinks: int,
    scaling: float,
    causal: bool,
    gates: str,
    support: Sequence[int] | None,
) -> list[Tensor]:
    """Return the gradients of those of `query`, `key`, `value` and `scores` for which `needed` says so."""
    options = _options(k, support, window=window, sinks=sinks, scaling=scaling, causal=causal, gates=gates)
    with recorded_gradients():
        inputs = [
            tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip((query, key, value, scores), needed, strict=True)
        ]
        output = attend_padded(*inputs, valid, valid, **options)
        learned = [tensor for tensor in inputs if tensor.requires_grad]
        gradients = torch.autograd.grad(output, learned, upstream.transpose(1, 2), materialize_grads=True)
    # The layout that the operator promises; what comes out of it is memory of its own.
    return [torch.empty_like(tensor).copy_(gradient) for tensor, gradient in zip(learned, gradients, strict=True)]


@_differentiate.register_fake
def _(upstream: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    tensors, needed = arguments[:4], arguments[5]
    return [torch.empty_like(tensor) for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    """Keep the inputs of the operator for its backward."""
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Return a gradient, or `None`, for each of the operator's tensors."""
    needed = list(ctx.needs_input_grad[:4])
    gradients = iter(_differentiate(upstream, *ctx.saved_tensors, needed, **ctx.options))
    return *(next(gradients) if is_needed else None for is_needed in needed), None


_attend.register_autograd(_backward, setup_context=_keep)
