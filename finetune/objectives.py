"""Compute the objectives that every method has, for each kind of model.

Each objective takes the model and a batch, and returns a scalar loss. A batch is chunks `[B, T]`; of a masked language
model, chunks with hidden tokens, and their labels `[B, T]`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sparse.core.overrides import override
from hf_sparse.data import IGNORED
from hf_sparse.finetune.predictions import Predictions, predict
from hf_sparse.finetune.recorded_loss import recorded_loss
from hf_sparse.finetune.teacher import predict_dense
from hf_sparse.model_kinds import Kind, final_states, pooled
from hf_sparse.ops.divergence import divergence
from hf_sparse.patches import sparse_layers, sparse_layers_in_use

_ROWS = 1024  # tokens that have logits at once


def distill(
    model: nn.Module, chunks: Tensor, *, lm_weight: float = 0.0, hidden_weight: float = 0.0, teacher_window: int = 0
) -> Tensor:
    """Return KL(dense teacher || sparse student) per token; the teacher is the same model with sparse attention off.

    Args:
        model: with sparse attention.
        chunks: `[B, T]` int64.
        lm_weight: weight of the next-token cross-entropy, which is added.
        hidden_weight: weight of the distance of the hidden states, see `hidden_distance`, which is added.
        teacher_window: tokens within which the teacher attends, see `dense_within`; 0 for all.
    """

    def loss(chunks: Tensor) -> Tensor:
        return _distill(model, chunks, lm_weight, hidden_weight, teacher_window)

    return recorded_loss(loss, model, chunks, lm_weight, hidden_weight, teacher_window)


def _distill(
    model: nn.Module, chunks: Tensor, lm_weight: float, hidden_weight: float, teacher_window: int = 0
) -> Tensor:
    options = {"use_cache": False, "output_hidden_states": bool(hidden_weight)}
    with torch.no_grad(), dense_within(model, chunks.shape[1], teacher_window):
        teacher = predict_dense(model, chunks, **options)
    student = predict(model, chunks, **options)
    loss = _divergence(student, teacher)
    if lm_weight:
        loss = loss + lm_weight * _next_token(student, chunks)
    if hidden_weight:
        loss = loss + hidden_weight * hidden_distance(student.hidden, teacher.hidden)
    return loss


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of hidden states by the teacher's squared norm; the mean over tokens and layers.

    Relative per token: a few tokens, the first above all, have states a hundred times as large as the others.

    Args:
        student, teacher: `[B, T, C]` for the embeddings, which are left out, and each layer.
    """
    pairs = list(zip(student, teacher, strict=True))[1:]
    return torch.stack([checkpoint(_relative_distance, *pair, use_reentrant=False) for pair in pairs]).mean()


def lm(model: nn.Module, chunks: Tensor) -> Tensor:
    """Return the next-token cross-entropy."""
    return _next_token(predict(model, chunks, use_cache=False), chunks)


def masked_distill(model: nn.Module, chunks: Tensor, labels: Tensor) -> Tensor:
    """Return KL(dense teacher || sparse student) per hidden token.

    Where nothing is hidden, a masked language model repeats what it sees: agreement there is cheap and would drown
    the positions that need context.
    """
    with torch.no_grad(), switched_off(model):
        teacher = predict(model, chunks)
    return _divergence(predict(model, chunks), teacher, labels != IGNORED)


def masked_lm(model: nn.Module, chunks: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the hidden tokens."""
    hidden = labels != IGNORED
    predictions = predict(model, chunks)
    return _cross_entropy(predictions, predictions.states[hidden], labels[hidden])


def feature_distill(model: nn.Module, chunks: Tensor) -> Tensor:
    """Return 1 - cosine of sparse and dense last hidden states, per token, plus that of their means over the text."""
    with torch.no_grad(), switched_off(model):
        teacher = final_states(model, chunks).float()
    student = final_states(model, chunks).float()
    tokens = 1 - F.cosine_similarity(student, teacher, dim=-1)
    texts = 1 - F.cosine_similarity(pooled(student), pooled(teacher), dim=-1)
    return tokens.mean() + texts.mean()


#: The shared objectives of each kind of model by name; a method may have others, see `hf_sparse.finetune.stages`.
OBJECTIVES: Mapping[Kind, dict[str, Callable[..., Tensor]]] = {
    "causal": {"distill": distill, "lm": lm},
    "masked": {"distill": masked_distill, "lm": masked_lm},
    "features": {"distill": feature_distill},
}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Switch sparse attention off for the length of a `with` block; what is trainable stays trainable."""
    layers = [layer for layer in sparse_layers(model) if not layer.disable_adapters]
    for layer in layers:
        layer.switch(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.switch(True)


def dense_within(model: nn.Module, length: int, window: int) -> AbstractContextManager[None]:
    """Let a model attend densely for the length of a `with` block, in time linear in the length if there is a window.

    Args:
        model: a causal language model with sparse attention.
        length: tokens of the texts that it is going to read, without padding and cache.
        window: the tokens that each token attends to at least, see `hf_sparse.ops.local_attention`; 0 for all. Texts of
            up to `2 * window` tokens are attended to as a whole, by the base model as it is.
    """
    if 0 < 2 * window < length:
        return override(sparse_layers_in_use(model), dense_window=window)
    return switched_off(model)


def _divergence(student: Predictions, teacher: Predictions, mask: Tensor | None = None) -> Tensor:
    """Return the mean of KL(teacher || student) over tokens, over those in `mask` `[B, T]` if there is one."""

    def loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.logits(teacher_states)
        return divergence(student.logits(student_states), target)

    if mask is None:
        return _mean_over_tokens(loss, student.states.flatten(0, 1), teacher.states.flatten(0, 1))
    return _mean_over_tokens(loss, student.states[mask], teacher.states[mask])


def _next_token(predictions: Predictions, chunks: Tensor) -> Tensor:
    """Return the cross-entropy of each token of chunks `[B, T]` but the first."""
    return _cross_entropy(predictions, predictions.states[:, :-1].flatten(0, 1), chunks[:, 1:].flatten())


def _cross_entropy(predictions: Predictions, states: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over tokens, of states `[N, C]` and labels `[N]`."""

    def loss(states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(predictions.logits(states).float(), labels, reduction="sum")

    return _mean_over_tokens(loss, states, labels)


def _relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)).mean()


def _mean_over_tokens(loss: Callable[[Tensor, Tensor], Tensor], states: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens `[N, ...]` of a loss that sums; a slice has logits at a time."""
    return _SumOfSlices.apply(loss, states, target) / len(states)


class _SumOfSlices(torch.autograd.Function):
    """Sum a loss over slices of tokens, each with its gradient at once: no logits wait for the backward.

    The gradient goes to the states alone; the head is frozen.
    """

    @staticmethod
    def forward(ctx: Any, loss: Callable[[Tensor, Tensor], Tensor], states: Tensor, target: Tensor) -> Tensor:
        total, gradients = states.new_zeros((), dtype=torch.float32), []
        for state_slice, target_slice in zip(states.split(_ROWS), target.split(_ROWS), strict=True):
            if ctx.needs_input_grad[1]:
                with torch.enable_grad():
                    state_slice = state_slice.detach().requires_grad_()
                    slice_loss = loss(state_slice, target_slice)
                gradients += torch.autograd.grad(slice_loss, state_slice)
            else:
                slice_loss = loss(state_slice, target_slice)
            total += slice_loss.detach()
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream, None
