"""Perplexity, divergence from dense attention, and embeddings.

Log-likelihoods are computed in float32, a slice of positions at a time, and summed in float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from hf_sparse.data import IGNORED
from hf_sparse.methods.sparsek import Budget
from hf_sparse.methods.sparsek.evaluation.budgets import at_budget, budget_of
from hf_sparse.methods.sparsek.evaluation.contenders import selection
from hf_sparse.model_kinds import final_states, pooled

_SLICE = 256  # positions whose logits are float32 at a time
_BINS = 16


@dataclass(frozen=True)
class Losses:
    """What one selection does to every token of `N` chunks but the first of each.

    Attributes:
        nats: `[N, T - 1]` float32, negative log-likelihoods.
        divergence: `[N, T - 1]` float32, KL divergence of the predictions from those of dense attention, in nats.
    """

    nats: Tensor
    divergence: Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats.double().mean().item())

    @property
    def mean_divergence(self) -> float:
        return self.divergence.double().mean().item()

    def last(self, count: int) -> "Losses":
        """Those of the last `count` tokens of each chunk."""
        return Losses(self.nats[:, -count:], self.divergence[:, -count:])

    def by_position(self, edges: Sequence[int]) -> list[float]:
        """Perplexity of the tokens at positions `edges[i]` to `edges[i + 1] - 1` of their chunks."""
        mean = self.nats.double().mean(0)
        return [math.exp(mean[start - 1 : stop - 1].mean().item()) for start, stop in pairwise(edges)]


def position_edges(length: int, first: int = 1) -> list[int]:
    """Edges of up to 16 bins of equal width over the predicted positions `first` to `length - 1`.

    >>> position_edges(2048)[:3], position_edges(2048)[-1], position_edges(4)
    ([1, 129, 257], 2048, [1, 2, 3, 4])
    """
    bins = min(_BINS, length - first)
    return [first + round(i * (length - first) / bins) for i in range(bins + 1)]


@torch.no_grad()
def perplexity(model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: str | bool = False) -> float:
    """`exp` of the mean negative log-likelihood of every token but the first of each chunk.

    The model runs as it is.

    Args:
        chunks: `[N, T]` int64, `T` at least 2.
        batch_size: chunks at a time.
        progress: a label for a progress bar on stderr, or False for none.
    """
    total = 0.0
    for (tokens,) in _batches(model, chunks, batch_size=batch_size, progress=progress and f"perplexity, {progress}"):
        for _, some, target in _slices(logits_of(model, tokens), tokens):
            total += _nats(some, target).double().sum().item()
    return math.exp(total / (chunks.shape[0] * (chunks.shape[1] - 1)))


def divergence(
    model: nn.Module, chunks: Tensor, name: str, *, batch_size: int = 1, progress: str | bool = False
) -> float:
    """Mean over tokens of the KL divergence of a selection's predictions from those of dense attention, in nats.

    Args:
        chunks: `[N, T]` int64, `T` at least 2; the last token of each predicts nothing and does not count.
        name: one of `selections_of(model)`.
        batch_size, progress: as for `perplexity`.
    """
    run = (budget_of(model), name)
    return compare(model, chunks, [run], batch_size=batch_size, progress=progress)[run].mean_divergence


@torch.no_grad()
def compare(
    model: nn.Module,
    chunks: Tensor,
    runs: Sequence[tuple[Budget, str]],
    *,
    batch_size: int = 1,
    progress: str | bool = False,
) -> dict[tuple[Budget, str], Losses]:
    """Losses of several selections at several budgets.

    The dense logits of one batch are kept in the model's dtype, and nothing else of that size.

    Args:
        chunks: `[N, T]` int64, `T` at least 2.
        runs: a budget and one of `selections_of(model)` each.
        batch_size, progress: as for `perplexity`.
    """
    found: dict[tuple[Budget, str], list[tuple[Tensor, Tensor]]] = {run: [] for run in runs}
    for (tokens,) in _batches(model, chunks, batch_size=batch_size, progress=progress and "perplexity"):
        with selection(model, "dense"):
            dense = logits_of(model, tokens)
        exact = torch.cat([_nats(some, target) for _, some, target in _slices(dense, tokens)], 1).cpu()
        for run in runs:
            if run[1] == "dense":
                found[run].append((exact, torch.zeros_like(exact)))
                continue
            nats, apart = [], []
            with at_budget(model, run[0]), selection(model, run[1]):
                for start, some, target in _slices(logits_of(model, tokens), tokens):
                    wanted = dense[:, start : start + some.shape[1]]
                    nats.append(_nats(some, target))
                    apart.append(kl(wanted, some))
            found[run].append((torch.cat(nats, 1).cpu(), torch.cat(apart, 1).cpu()))
    return {run: Losses(*(torch.cat(parts) for parts in zip(*pairs, strict=True))) for run, pairs in found.items()}


@torch.no_grad()
def masked_perplexity(
    model: nn.Module, chunks: Tensor, labels: Tensor, *, batch_size: int = 1, progress: str | bool = False
) -> float:
    """`exp` of the mean negative log-likelihood of the hidden tokens.

    Args:
        chunks: `[N, T]` int64 with hidden tokens; labels: `[N, T]`, what they were, -100 elsewhere.
        batch_size, progress: as for `perplexity`.
    """
    total = 0.0
    label = progress and f"masked-token perplexity, {progress}"
    for tokens, wanted in _batches(model, chunks, labels, batch_size=batch_size, progress=label):
        hidden = wanted != IGNORED
        logits = model(input_ids=tokens).logits[hidden]
        total += F.cross_entropy(logits.float(), wanted[hidden], reduction="none").double().sum().item()
    return math.exp(total / int((labels != IGNORED).sum()))


@torch.no_grad()
def embeddings(model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: str | bool = False) -> Tensor:
    """Mean of the last hidden states of each chunk: `[N, C]` float32, on the CPU.

    Args:
        chunks: `[N, T]` int64.
        batch_size, progress: as for `perplexity`.
    """
    batches = _batches(model, chunks, batch_size=batch_size, progress=progress and f"embeddings, {progress}")
    return torch.cat([pooled(final_states(model, tokens)).cpu() for (tokens,) in batches])


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """`[B, T, V]` in the model's dtype."""
    return model(input_ids=tokens, use_cache=False).logits


def _slices(logits: Tensor, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Where a slice of positions starts, its logits `[B, some, V]`, and the tokens `[B, some]` that these predict."""
    parts = zip(logits[:, :-1].split(_SLICE, 1), tokens[:, 1:].split(_SLICE, 1), strict=True)
    for number, (some, target) in enumerate(parts):
        yield number * _SLICE, some, target


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")


def kl(wanted: Tensor, found: Tensor) -> Tensor:
    """KL divergence `[B, T]` of predictions `found` from `wanted`, logits `[B, T, V]`, in nats."""
    wanted, found = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)


def _batches(model: nn.Module, *rows: Tensor, batch_size: int, progress: str | bool) -> Iterator[tuple[Tensor, ...]]:
    """Equal rows of some tensors, `batch_size` at a time, on the model's device."""
    device = next(model.parameters()).device
    batches: Any = list(zip(*(tensor.split(batch_size) for tensor in rows), strict=True))
    if progress:
        batches = track(batches, str(progress), console=Console(stderr=True), transient=True)
    for batch in batches:
        yield tuple(tensor.to(device) for tensor in batch)
