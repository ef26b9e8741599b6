"""Measure what a part of a model loses by having few slots while the rest attends to all keys."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.core.settings import check_integer
from hf_sparse.data import check_chunks
from hf_sparse.evaluation.quality import kl
from hf_sparse.evaluation.switching import evaluating, using
from hf_sparse.finetune.predictions import Predictions, predict
from hf_sparse.methods.sparsek.evaluation.contenders import sparsek_layers
from hf_sparse.progress import tracked

Part = TypeVar("Part", bound=Hashable)

_SLICE = 256  # positions that have logits at a time: those of a whole text would take more memory than training


@torch.no_grad()
def damages(
    model: nn.Module,
    chunks: Tensor,
    ways: Mapping[Part, Mapping[str, Any]],
    whole: Mapping[str, Any],
    label: str,
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[Part, float]:
    """Return the KL divergence from attention to all keys, in nats per token, that each part of a model causes alone.

    An adapter's LoRA stays on.

    Args:
        model: a patched causal language model; it comes back as it was.
        chunks: `[N, T]` int64.
        ways: for each part the settings of the configuration with which it alone has few slots.
        whole: those with which nothing is evicted.
        label: what the progress is called.
        batch_size: chunks at a time.
        progress: show on stderr how far the work is.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model that is not patched, or a `batch_size` below 1.
    """
    check_chunks(model, chunks)
    check_integer("batch_size", batch_size, least=1)
    config, device = sparsek_layers(model)[0].config, next(model.parameters()).device
    sums = dict.fromkeys(ways, 0.0)
    steps = [
        (tokens, part, settings)
        for tokens in chunks.split(batch_size)
        for part, settings in ((None, whole), *ways.items())
    ]
    with evaluating(model), using(model, "learned"):
        for tokens, part, settings in tracked(steps, label) if progress else steps:
            with override([config], **settings):
                predictions = predict(model, tokens.to(device), use_cache=False)
            if part is None:
                dense = predictions
            else:
                sums[part] += _divergence(dense, predictions)
    return {part: total / (len(chunks) * (chunks.shape[1] - 1)) for part, total in sums.items()}


def _divergence(dense: Predictions, sparse: Predictions) -> float:
    """Return the KL divergence from predictions with all keys, summed over all tokens but the last ones."""
    pairs = zip(*(one.states[:, :-1].split(_SLICE, 1) for one in (dense, sparse)), strict=True)
    return sum(kl(dense.logits(one), sparse.logits(other)).double().sum().item() for one, other in pairs)
