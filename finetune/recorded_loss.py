"""Run a training step of a small model, forward and backward, as one CUDA graph, where it would wait for the host.

A step of a model of some hundred million parameters launches thousands of kernels, and Python takes longer for that
than the GPU for the kernels. Steps of a run repeat one shape. The first ones run as ever; the next one is recorded with
its gradients, and later ones play it. Whatever cannot be recorded runs as ever, and so does a step whose recording
gives another loss or other gradients than the step that ran.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_sparse.finetune.teacher import is_small, tensors_of
from hf_sparse.model_kinds import transformers_model
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.recorded_steps import free_memory, record

_EAGER = 2  # steps of a layout before one is recorded
_TOLERANCE = 0.01  # of the norm: kernels add up in any order, and steps may run in bfloat16
_NOISE = 2.0  # times as far as two steps that ran are apart
_ROOM = 1.5  # a recording keeps its memory: this many times the peak so far must be left


@dataclass
class _Recording:
    """Hold the recorded step of one layout.

    Attributes:
        layout: what must be the same for a replay.
        steps: how many of this layout came.
        replay: plays the step; `None` before it is recorded, or if it cannot be.
        chunks: the input that it reads.
        results: the loss, and the gradients of all that is trained, flat and one after another.
        shapes: of the gradients, `None` for a parameter that the loss does not depend on.
    """

    layout: Hashable
    steps: int = 0
    replay: Callable[[], None] | None = None
    chunks: Tensor | None = None
    results: tuple[Tensor, Tensor] | None = None
    shapes: list[torch.Size | None] = field(default_factory=list)


_recordings: weakref.WeakKeyDictionary[nn.Module, _Recording] = weakref.WeakKeyDictionary()


def recorded_loss(compute: Callable[[Tensor], Tensor], model: nn.Module, chunks: Tensor, *settings: Hashable) -> Tensor:
    """Return `compute(chunks)`, a scalar loss of a model, with its gradient.

    Args:
        compute: the same function of the chunks for the same settings.
        model: with sparse attention.
        chunks: `[B, T]`.
        *settings: what else the loss depends on.
    """
    if not _is_on_gpu(chunks) or not torch.is_grad_enabled():
        return compute(chunks)
    base = transformers_model(model)
    weights = tensors_of(base)
    keys = [layer.recording_key() for layer in sparse_layers(model)]
    if any([key is None for key in keys]) or not is_small(base, weights, chunks):
        return compute(chunks)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    addresses = [(tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in weights]
    is_repeated = getattr(base, "is_gradient_checkpointing", False)
    layout = (model is base, chunks.shape, chunks.dtype, settings, is_repeated, tuple(keys), tuple(addresses))
    recording = _recordings.get(base)
    if recording is None or recording.layout != layout:
        recording = _recordings[base] = _Recording(layout)
    recording.steps += 1
    if recording.steps == _EAGER + 1 and learned and not is_repeated and _has_room(chunks.device):
        _record(recording, compute, model, chunks, learned)
    if recording.replay is None:
        return compute(chunks)
    loss: Tensor = _Replayed.apply(recording, chunks, *learned)
    return loss


def forget(model: nn.Module) -> None:
    """Give back the memory of what was recorded for a model."""
    for module in model.modules():
        _recordings.pop(module, None)


def _is_on_gpu(chunks: Tensor) -> bool:
    return chunks.is_cuda


def _has_room(device: torch.device) -> bool:
    """Tell whether the device has as much memory left as a step takes, for the steps that run as ever beside it."""
    return free_memory(device) > _ROOM * torch.cuda.max_memory_allocated(device)


def _record(
    recording: _Recording,
    compute: Callable[[Tensor], Tensor],
    model: nn.Module,
    chunks: Tensor,
    learned: list[nn.Parameter],
) -> None:
    """Record the step without taking it; leave the recording as it is if that cannot be done, or plays another step."""
    recording.chunks = static = chunks.clone()

    def step() -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), _new_leaves(model, learned) as leaves:
            loss = compute(static)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        recording.shapes = [None if gradient is None else gradient.shape for gradient in gradients]
        flat = [gradient.flatten().float() for gradient in gradients if gradient is not None]
        return loss.detach(), torch.cat(flat)

    try:
        recording.results, recording.replay = record(step, chunks.device)
    except RuntimeError:  # it waits for the device, or calls what cannot be recorded
        recording.chunks = recording.results = recording.replay = None
        return
    recording.replay()
    if not _agree(recording.results, step(), step):
        warnings.warn("a recorded training step differs from one that ran, so all steps run", stacklevel=2)
        recording.chunks = recording.results = recording.replay = None


@contextmanager
def _new_leaves(model: nn.Module, learned: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Put parameters that autograd does not know yet, with the same memory, in place of those that are trained.

    While the loss of an earlier step lives, autograd keeps the stream of that step with each parameter, and would wait
    for it within the recording, which ends that.
    """
    new = {parameter: nn.Parameter(parameter.detach()) for parameter in learned}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter in new
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = new[parameter]
        yield list(new.values())
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _agree(
    played: tuple[Tensor, Tensor], ran: tuple[Tensor, Tensor], run_again: Callable[[], tuple[Tensor, Tensor]]
) -> bool:
    """Tell whether loss and gradients are equal but for the order of sums.

    Where they differ, another run tells how far two runs differ: the order of sums may be a large part of small
    gradients.
    """
    apart = [float((one - other).norm()) for one, other in zip(played, ran, strict=True)]
    if all(norm <= _TOLERANCE * float(other.norm()) for norm, other in zip(apart, ran, strict=True)):
        return True
    noise = [float((one - other).norm()) for one, other in zip(run_again(), ran, strict=True)]
    return all(
        norm <= max(_TOLERANCE * float(other.norm()), _NOISE * of_runs)
        for norm, of_runs, other in zip(apart, noise, ran, strict=True)
    )


class _Replayed(torch.autograd.Function):
    """Play a recorded step, whose gradients the backward has then."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, chunks: Tensor, *learned: Tensor) -> Tensor:
        assert recording.chunks is not None and recording.results is not None and recording.replay is not None
        recording.chunks.copy_(chunks)
        recording.replay()
        loss, gradients = (result.clone() for result in recording.results)  # the next step writes over them
        ctx.shapes, ctx.dtypes = recording.shapes, [parameter.dtype for parameter in learned]
        ctx.save_for_backward(gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        sizes = [shape.numel() for shape in ctx.shapes if shape is not None]
        parts = iter((gradients * upstream).split(sizes))
        return (
            None,
            None,
            *(
                None if shape is None else next(parts).view(shape).to(dtype)
                for shape, dtype in zip(ctx.shapes, ctx.dtypes, strict=True)
            ),
        )
