"""Measure perplexity, divergence from reference predictions, and embeddings.

Log-likelihoods are computed in float32, a slice of positions at a time, and summed in float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse.data import IGNORED
from hf_sparse.evaluation.switching import evaluation_of, using
from hf_sparse.model_kinds import Kind, final_states, pooled
from hf_sparse.progress import tracked

_SLICE = 256  # positions whose logits are float32 at a time
_BINS = 16


@dataclass(frozen=True)
class Losses:
    """Hold the losses of one contender on every token of `N` chunks but the first of each.

    Attributes:
        nats: `[N, T - 1]` float32, negative log-likelihoods.
        divergence: `[N, T - 1]` float32, KL divergence of the predictions from those of dense attention, in nats.
    """

    nats: Tensor
    divergence: Tensor

    @property
    def perplexity(self) -> float:
        """Return `exp` of the mean negative log-likelihood."""
        return math.exp(self.nats.double().mean().item())

    @property
    def mean_divergence(self) -> float:
        """Return the mean divergence over all tokens."""
        return self.divergence.double().mean().item()

    def last(self, count: int) -> "Losses":
        """Return the losses of the last `count` tokens of each chunk."""
        return Losses(self.nats[:, -count:], self.divergence[:, -count:])

    def by_position(self, edges: Sequence[int]) -> list[float]:
        """Return the perplexity of the tokens at positions `edges[i]` to `edges[i + 1] - 1` of their chunks."""
        mean = self.nats.double().mean(0)
        return [math.exp(mean[start - 1 : stop - 1].mean().item()) for start, stop in pairwise(edges)]


def position_edges(length: int, first: int = 1) -> list[int]:
    """Return the edges of up to 16 bins of equal width over the predicted positions `first` to `length - 1`.

    >>> position_edges(2048)[:3], position_edges(2048)[-1], position_edges(4)
    ([1, 129, 257], 2048, [1, 2, 3, 4])
    """
    bins = min(_BINS, length - first)
    return [first + round(i * (length - first) / bins) for i in range(bins + 1)]


@torch.no_grad()
def perplexity(model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: str | bool = False) -> float:
    """Return `exp` of the mean negative log-likelihood of every token but the first of each chunk.

    The model runs as it is.

    Args:
        chunks: `[N, T]` int64, `T` at least 2.
        batch_size: chunks at a time.
        progress: a label for a progress bar on stderr, or False for none.
    """
    total = 0.0
    for (tokens,) in _batches(model, chunks, batch_size=batch_size, progress=progress and f"perplexity, {progress}"):
        for nats, _ in prediction_losses(logits_of(model, tokens)[:, :-1], tokens[:, 1:]):
            total += nats.double().sum().item()
    return math.exp(total / (chunks.shape[0] * (chunks.shape[1] - 1)))


def divergence(
    model: nn.Module, chunks: Tensor, name: str, *, batch_size: int = 1, progress: str | bool = False
) -> float:
    """Return the mean over tokens of the KL divergence of a contender's predictions from dense attention's, in nats.

    Args:
        chunks: `[N, T]` int64, `T` at least 2; the last token of each predicts nothing and does not count.
        name: one of the contenders of the model.
        batch_size, progress: as for `perplexity`.
    """
    run = (evaluation_of(model).budget(model), name)
    return compare(model, chunks, [run], batch_size=batch_size, progress=progress)[run].mean_divergence


@torch.no_grad()
def compare(
    model: nn.Module,
    chunks: Tensor,
    runs: Sequence[tuple[Any, str]],
    *,
    batch_size: int = 1,
    progress: str | bool = False,
) -> dict[tuple[Any, str], Losses]:
    """Return the losses of several contenders at several budgets.

    The dense logits of one batch are kept in the model's dtype, and nothing else of that size.

    Args:
        chunks: `[N, T]` int64, `T` at least 2.
        runs: a budget of the method and one of the contenders of the model each.
        batch_size, progress: as for `perplexity`.
    """
    values: dict[tuple[Any, str], list[tuple[Tensor, Tensor]]] = {run: [] for run in runs}
    for (tokens,) in _batches(model, chunks, batch_size=batch_size, progress=progress and "perplexity"):
        targets = tokens[:, 1:]
        with using(model, "dense"):
            dense = logits_of(model, tokens)[:, :-1]
        dense_losses = _on_cpu(prediction_losses(dense, targets))
        for run in runs:
            if run[1] == "dense":
                values[run].append(dense_losses)
                continue
            with using(model, run[1], run[0]):
                values[run].append(_on_cpu(prediction_losses(logits_of(model, tokens)[:, :-1], targets, dense)))
    return {run: Losses(*(torch.cat(batches) for batches in zip(*pairs, strict=True))) for run, pairs in values.items()}


@torch.no_grad()
def masked_perplexity(
    model: nn.Module, chunks: Tensor, labels: Tensor, *, batch_size: int = 1, progress: str | bool = False
) -> float:
    """Return `exp` of the mean negative log-likelihood of the hidden tokens.

    Args:
        chunks: `[N, T]` int64 with hidden tokens; labels: `[N, T]`, what they were, -100 elsewhere.
        batch_size, progress: as for `perplexity`.
    """
    total = 0.0
    label = progress and f"masked-token perplexity, {progress}"
    for tokens, targets in _batches(model, chunks, labels, batch_size=batch_size, progress=label):
        nats, _ = _joined(prediction_losses(outputs(model, "masked", tokens, targets), targets[targets != IGNORED]))
        total += nats.double().sum().item()
    return math.exp(total / int((labels != IGNORED).sum()))


@torch.no_grad()
def embeddings(model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: str | bool = False) -> Tensor:
    """Return the mean of the last hidden states of each chunk: `[N, C]` float32, on the CPU.

    Args:
        chunks: `[N, T]` int64.
        batch_size, progress: as for `perplexity`.
    """
    batches = _batches(model, chunks, batch_size=batch_size, progress=progress and f"embeddings, {progress}")
    return torch.cat([pooled(final_states(model, tokens)).cpu() for (tokens,) in batches])


@torch.no_grad()
def outputs(model: nn.Module, kind: Kind, tokens: Tensor, labels: Tensor | None) -> Tensor:
    """Return the logits `[n, V]` of everything that a language model predicts, or embeddings `[B, C]` without a head.

    Args:
        tokens, labels: `[B, T]`; labels are of a masked language model.
    """
    if kind == "features":
        return pooled(final_states(model, tokens))
    if kind == "causal":
        return logits_of(model, tokens)[:, :-1].flatten(0, 1)
    assert labels is not None
    return model(input_ids=tokens).logits[labels != IGNORED]


@torch.no_grad()
def compare_outputs(
    kind: Kind, values: Tensor, reference: Tensor, tokens: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """Return per prediction `nats`, `divergence` (KL from the reference, nats) and, of hidden tokens, `accuracy`.

    Without predictions, `embedding_similarity` per text: the cosine to the reference.

    Args:
        values, reference: see `outputs`.
        tokens, labels: `[B, T]`.
    """
    if kind == "features":
        return {"embedding_similarity": F.cosine_similarity(values.double(), reference.double(), dim=-1)}
    targets = tokens[:, 1:].flatten() if labels is None else labels[labels != IGNORED]
    nats, divergences = _joined(prediction_losses(values, targets, reference))
    losses = {"nats": nats, "divergence": divergences}
    return losses if kind == "causal" else losses | {"accuracy": (values.argmax(-1) == targets).double()}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits `[B, T, V]` in the model's dtype."""
    return model(input_ids=tokens, use_cache=False).logits


def prediction_losses(
    logits: Tensor, targets: Tensor, reference: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield negative log-likelihoods and KL divergences from reference predictions, in nats, a slice at a time.

    Args:
        logits, reference: `[..., n, V]`; without a reference the divergences are zero.
        targets: `[..., n]` int64.

    Yields:
        Two tensors `[..., up to 256]` float32.
    """
    references = logits.split(_SLICE, -2) if reference is None else reference.split(_SLICE, -2)
    slices = zip(logits.split(_SLICE, -2), targets.split(_SLICE, -1), references, strict=True)
    for predicted, target, expected in slices:
        log_predicted = predicted.float().log_softmax(-1)  # once, for both
        nats = -log_predicted.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        yield nats, torch.zeros_like(nats) if reference is None else _divergence(expected, log_predicted)


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Return the KL divergence `[..., n]` of predictions from reference predictions, logits `[..., n, V]`, in nats."""
    return _divergence(reference, logits.float().log_softmax(-1))


def _divergence(reference: Tensor, log_predicted: Tensor) -> Tensor:
    """Return the KL divergence `[..., n]` of log-probabilities from reference logits, `[..., n, V]` each, in nats."""
    expected = reference.float().log_softmax(-1)
    return F.kl_div(log_predicted, expected, log_target=True, reduction="none").sum(-1)


def _joined(slices: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the values of all slices, `[..., n]` each."""
    nats, divergences = zip(*slices, strict=True)
    return torch.cat(nats, -1), torch.cat(divergences, -1)


def _on_cpu(slices: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    nats, divergences = _joined(slices)
    return nats.cpu(), divergences.cpu()


def _batches(model: nn.Module, *rows: Tensor, batch_size: int, progress: str | bool) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of several tensors, `batch_size` at a time, on the model's device."""
    device = next(model.parameters()).device
    batches: Any = list(zip(*(tensor.split(batch_size) for tensor in rows), strict=True))
    if progress:
        batches = tracked(batches, str(progress))
    for batch in batches:
        yield tuple(tensor.to(device) for tensor in batch)
