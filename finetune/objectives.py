"""What is minimised, for each kind of model.

Each objective takes the model and a batch, and returns a scalar loss. A batch is chunks `[B, T]`; of a masked language
model, chunks with hidden tokens, and their labels `[B, T]`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sparse.data import IGNORED
from hf_sparse.finetune.config import Objective
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.ops.attention.mass import far_attention_mass
from hf_sparse.patches import methods_in_use, methods_of
from hf_sparse.tasks import Kind, final_states, pooled

_ROWS = 1024  # tokens whose float32 logits are held at once

# The last keys of a chunk are behind too few queries for their mass to mean anything.
UNSETTLED = 64


def distill(model: nn.Module, chunks: Tensor) -> Tensor:
    """KL(dense teacher || sparse student) per token, the teacher being the same model with sparse attention off."""
    with torch.no_grad(), switched_off(model):
        teacher = model(input_ids=chunks, use_cache=False).logits
    student = model(input_ids=chunks, use_cache=False).logits
    return _mean_over_tokens(_divergence, student.flatten(0, 1), teacher.flatten(0, 1))


def lm(model: nn.Module, chunks: Tensor) -> Tensor:
    """Next-token cross-entropy."""
    logits = model(input_ids=chunks, use_cache=False).logits[:, :-1]
    return _mean_over_tokens(_cross_entropy, logits.flatten(0, 1), chunks[:, 1:].flatten())


def masked_distill(model: nn.Module, chunks: Tensor, labels: Tensor) -> Tensor:
    """KL(dense teacher || sparse student) per hidden token.

    Where nothing is hidden, a masked language model repeats what it sees: agreement there is cheap and would drown
    the positions that need context.
    """
    hidden = labels != IGNORED
    with torch.no_grad(), switched_off(model):
        teacher = model(input_ids=chunks).logits[hidden]
    student = model(input_ids=chunks).logits[hidden]
    return _mean_over_tokens(_divergence, student, teacher)


def masked_lm(model: nn.Module, chunks: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the hidden tokens."""
    hidden = labels != IGNORED
    return _mean_over_tokens(_cross_entropy, model(input_ids=chunks).logits[hidden], labels[hidden])


def feature_distill(model: nn.Module, chunks: Tensor) -> Tensor:
    """1 - cosine between sparse and dense last hidden states, per token, plus that of their means over the text."""
    with torch.no_grad(), switched_off(model):
        teacher = final_states(model, chunks).float()
    student = final_states(model, chunks).float()
    tokens = 1 - F.cosine_similarity(student, teacher, dim=-1)
    texts = 1 - F.cosine_similarity(pooled(student), pooled(teacher), dim=-1)
    return tokens.mean() + texts.mean()


def attention(model: nn.Module, chunks: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
    """Mean squared error of scores against log far-attention mass, both centred; the mean over layers.

    The forward is dense, so the layers are independent and nothing but the scorers is differentiated.

    Args:
        **options: for the model's forward.
    """
    losses: list[Tensor] = []
    methods = methods_in_use(model)

    def observe(method: SparseKAttention) -> Any:
        def observer(query: Tensor, key: Tensor, scores: Tensor, scaling: float) -> None:
            config = method.config
            mass = far_attention_mass(query, key, window=config.window, scaling=scaling, causal=method.causal)
            # In both directions, every key is far from about as many queries.
            unsettled = config.window + UNSETTLED if method.causal else 0
            settled = slice(config.sinks, max(config.sinks + 1, scores.shape[-1] - unsettled))
            target = (mass[..., settled] + 1e-6).log()
            found = scores[..., settled]
            error = (found - found.mean(-1, keepdim=True)) - (target - target.mean(-1, keepdim=True))
            losses.append(error.square().mean().to(chunks.device))

        return observer

    try:
        for method in methods:
            method.observer = observe(method)
        model(input_ids=chunks, **options)
    finally:
        for method in methods:
            method.observer = None
    return torch.stack(losses).mean()


OBJECTIVES: Mapping[Kind, dict[Objective, Callable[..., Tensor]]] = {
    "causal": {
        "distill": distill,
        "lm": lm,
        "attention": partial(attention, use_cache=False, logits_to_keep=1),
    },
    "masked": {"distill": masked_distill, "lm": masked_lm, "attention": attention},
    "features": {"distill": feature_distill, "attention": attention},
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
    """Mean of a summed loss over tokens `[N, V]`, some rows at a time, so that few of them are float32 at once."""
    parts = [
        checkpoint(loss, logits[i : i + _ROWS], target[i : i + _ROWS], use_reentrant=False)
        for i in range(0, len(logits), _ROWS)
    ]
    return torch.stack(parts).sum() / len(logits)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="sum")


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="sum")
