"""Run the dense teacher of a small model as one CUDA graph, where its launches would take longer than its kernels.

The teacher is the frozen base model, and runs the same kernels in every step. The first calls of a layout run as ever;
the next one is recorded, and later ones replay it. Whatever cannot be recorded runs as ever.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.finetune.predictions import Predictions, predict
from hf_sparse.model_kinds import transformers_model
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.recorded_steps import calls_nothing_else, record

_MOST_WORK = 2e12  # parameters times tokens of a forward that is bound by the host
_EAGER = 2  # calls of a layout before one is recorded: libraries make their plans and allocate in them


@dataclass
class _Teacher:
    """Hold the recorded forward of one layout.

    Attributes:
        layout: what must be the same for a replay: shape of the tokens, windows, options, addresses and dtypes of all
            weights.
        calls: how often this layout was asked for.
        replay: plays the forward; `None` before it is recorded, or if it cannot be.
        tokens: the input that it reads.
        predictions: what it writes.
    """

    layout: tuple[Any, ...]
    calls: int = 0
    replay: Callable[[], None] | None = None
    tokens: Tensor | None = None
    predictions: Predictions | None = None


_teachers: weakref.WeakKeyDictionary[nn.Module, _Teacher] = weakref.WeakKeyDictionary()


def predict_dense(model: nn.Module, tokens: Tensor, **options: Any) -> Predictions:
    """Return `predict(model, tokens, **options)`, without gradients and with dense attention.

    What it returns may be written over by the next call for the same model.

    Args:
        model: a language model whose sparse attention is switched off, or dense within a window.
        tokens: `[B, T]`.
        **options: for its forward, hashable.
    """
    base = transformers_model(model)
    weights = tensors_of(base)
    if not is_small(base, weights, tokens) or torch.is_grad_enabled():
        return predict(model, tokens, **options)
    addresses = tuple([(tensor.data_ptr(), tensor.dtype) for tensor in weights])
    windows = tuple([layer.dense_window for layer in sparse_layers(model)])
    layout = (model is base, tokens.shape, tokens.dtype, windows, tuple(sorted(options.items())), addresses)
    teacher = _teachers.get(base)
    if teacher is None or teacher.layout != layout:
        teacher = _teachers[base] = _Teacher(layout)
    if teacher.replay is not None:
        assert teacher.tokens is not None and teacher.predictions is not None
        teacher.tokens.copy_(tokens)
        teacher.replay()
        return teacher.predictions
    teacher.calls += 1
    if teacher.calls == _EAGER + 1:
        try:
            return _record(teacher, model, tokens, options)
        except RuntimeError:  # it waits for the device, or calls what cannot be recorded
            teacher.replay = teacher.tokens = teacher.predictions = None
    return predict(model, tokens, **options)


def forget(model: nn.Module) -> None:
    """Give back the memory of what was recorded for a model."""
    for module in model.modules():
        _teachers.pop(module, None)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of a model, some more than once."""
    of_modules = [(*module._parameters.values(), *module._buffers.values()) for module in model.modules()]
    return [tensor for tensors in of_modules for tensor in tensors if tensor is not None]


def is_small(base: PreTrainedModel, weights: list[Tensor], tokens: Tensor) -> bool:
    """Tell whether a forward may be recorded: on a GPU, in `eval` mode, bound by the host, with no hooks of others."""
    if not tokens.is_cuda or torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling():
        return False
    work = tokens.numel() * sum([weight.numel() for weight in weights])
    if work > _MOST_WORK or torch.cuda.is_current_stream_capturing():
        return False
    return all([weight.device == tokens.device for weight in weights]) and calls_nothing_else(base)


def _record(teacher: _Teacher, model: nn.Module, tokens: Tensor, options: dict[str, Any]) -> Predictions:
    """Record the forward, run it once and return what it predicts."""
    teacher.tokens = static = tokens.clone()
    teacher.predictions, teacher.replay = record(lambda: predict(model, static, **options), tokens.device)
    teacher.replay()
    return teacher.predictions
