"""What a model makes of texts under one kind of attention, against a reference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse.data import IGNORED
from hf_sparse.evaluation.quality import kl, logits_of
from hf_sparse.model_kinds import Kind, final_states, pooled

_SLICE = 256  # predictions that are float32 at a time


@dataclass
class Sums:
    """Sums over texts of what is measured, and how many values each sum has."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in one value per prediction, or per text."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value.double().sum().item()
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def means(self, kind: Kind) -> dict[str, float]:
        """The metric of a kind of models by its key in eval.json, and what else was measured."""
        means = {name: total / self.counts[name] for name, total in self.totals.items()}
        if kind == "features":
            return means
        perplexity = math.exp(means.pop("nats"))
        return {"perplexity" if kind == "causal" else "masked_perplexity": perplexity, **means}


@torch.no_grad()
def output_of(model: nn.Module, kind: Kind, tokens: Tensor, labels: Tensor | None) -> Tensor:
    """Logits `[n, V]` of everything that a language model predicts, or embeddings `[B, C]` of one without a head."""
    if kind == "features":
        return pooled(final_states(model, tokens))
    if kind == "causal":
        return logits_of(model, tokens)[:, :-1].flatten(0, 1)
    assert labels is not None
    return model(input_ids=tokens).logits[labels != IGNORED]


@torch.no_grad()
def compared(kind: Kind, found: Tensor, reference: Tensor, tokens: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Values per prediction: `nats`, `divergence` (KL from the reference, nats) and, of hidden tokens, `accuracy`.

    Without predictions, `embedding_similarity` per text: the cosine to the reference.

    Args:
        found, reference: see `output_of`.
        tokens, labels: `[B, T]`.
    """
    if kind == "features":
        return {"embedding_similarity": F.cosine_similarity(found.double(), reference.double(), dim=-1)}
    target = tokens[:, 1:].flatten() if labels is None else labels[labels != IGNORED]
    parts = zip(*(tensor.split(_SLICE) for tensor in (found, reference, target)), strict=True)
    nats, apart, right = [], [], []
    for some, wanted, answer in parts:
        nats.append(F.cross_entropy(some.float(), answer, reduction="none"))
        apart.append(kl(wanted, some))
        right.append((some.argmax(-1) == answer).double())
    values = {"nats": torch.cat(nats), "divergence": torch.cat(apart)}
    return values if kind == "causal" else values | {"accuracy": torch.cat(right)}
