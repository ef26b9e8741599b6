"""What is minimised. Each objective takes the model and a batch of chunks `[B, T]` and returns a scalar loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sparse.finetune.config import Objective
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.ops.attention.mass import far_attention_mass
from hf_sparse.patches import methods_of

_ROWS = 1024  # tokens whose float32 logits are held at once

# The last keys of a chunk are behind too few queries for their mass to mean anything.
UNSETTLED = 64


def distill(model: nn.Module, chunks: Tensor) -> Tensor:
    """KL(dense teacher || sparse student) per token, the teacher being the same model with sparse attention off."""
    with torch.no_grad(), switched_off(model):
        teacher = model(input_ids=chunks, use_cache=False).logits
    student = model(input_ids=chunks, use_cache=False).logits
    return _mean_over_tokens(_divergence, student, teacher)


def lm(model: nn.Module, chunks: Tensor) -> Tensor:
    """Next-token cross-entropy."""
    logits = model(input_ids=chunks, use_cache=False).logits[:, :-1]
    return _mean_over_tokens(_cross_entropy, logits, chunks[:, 1:])


def attention(model: nn.Module, chunks: Tensor) -> Tensor:
    """Mean squared error of scores against log far-attention mass, both centred; the mean over layers.

    The forward is dense, so the layers are independent and nothing but the scorers is differentiated.
    """
    losses: list[Tensor] = []
    methods = methods_of(model)

    def observe(method: SparseKAttention) -> Any:
        def observer(query: Tensor, key: Tensor, scores: Tensor, scaling: float) -> None:
            config = method.config
            mass = far_attention_mass(query, key, window=config.window, scaling=scaling)
            length = scores.shape[-1]
            settled = slice(config.sinks, max(config.sinks + 1, length - config.window - UNSETTLED))
            target = (mass[..., settled] + 1e-6).log()
            found = scores[..., settled]
            error = (found - found.mean(-1, keepdim=True)) - (target - target.mean(-1, keepdim=True))
            losses.append(error.square().mean().to(chunks.device))

        return observer

    try:
        for method in methods:
            method.observer = observe(method)
        model(input_ids=chunks, use_cache=False, logits_to_keep=1)
    finally:
        for method in methods:
            method.observer = None
    return torch.stack(losses).mean()


OBJECTIVES: dict[Objective, Callable[[nn.Module, Tensor], Tensor]] = {
    "distill": distill,
    "lm": lm,
    "attention": attention,
}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The dense base model for the length of a `with` block; what is trainable stays trainable."""
    on = [method for method in methods_of(model) if not method.disable_adapters]
    for method in on:
        method.switch(False)
    try:
        yield
    finally:
        for method in on:
            method.switch(True)


def _mean_over_tokens(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    """Mean of a summed loss over tokens, some rows at a time, so that few of them are float32 at once."""
    logits, target = logits.flatten(0, 1), target.flatten(0, 1)
    parts = [
        checkpoint(loss, logits[i : i + _ROWS], target[i : i + _ROWS], use_reentrant=False)
        for i in range(0, len(logits), _ROWS)
    ]
    return torch.stack(parts).sum() / len(logits)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="sum")


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="sum")
