"""Score a key by nothing but where it stands."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.baselines.baseline import Arrivals, Baseline
from hf_sparse.methods.sparsek.budget import Budget


@dataclass(frozen=True)
class Recency(Baseline):
    """Keep the nearest keys: a window of `window + k`, that is StreamingLLM (Xiao et al. 2023, 2309.17453).

    In an encoder the nearest keys are those on both sides, which no score per key could say: there `window + k` is the
    window of the attention, and nothing is selected.
    """

    bidirectional: ClassVar[bool] = True

    def __call__(self, new: Arrivals) -> Tensor:
        return new.index[:, None].expand(-1, new.key.shape[1], -1).float()

    def budget(self, budget: Budget, causal: bool) -> Budget:
        if causal:
            return budget
        counts = budget.per_head(1)  # a window is that of all heads
        return Budget(0, budget.window + round(sum(counts) / len(counts)), budget.sinks)


@dataclass(frozen=True)
class Random(Baseline):
    """Keep random keys: a hash of layer, head and position, uniform and independent, that needs no state."""

    bidirectional: ClassVar[bool] = True

    def __call__(self, new: Arrivals) -> Tensor:
        heads = new.key.shape[1]
        head = torch.arange(heads, device=new.index.device)[:, None] + heads * new.layer
        mixed = new.index[:, None] * 2654435761 + head * 40503 + 12345
        for shift, factor in ((15, 2246822519), (13, 3266489917)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
        return (mixed ^ (mixed >> 16)).to(torch.float64).div_(2**32).float()


@dataclass(frozen=True)
class PromptRandom(Random):
    """Keep the prompt, and of what follows random keys, as "Random Attention" does (2026, 2609.03430).

    The prompt is the first input to a cache. Of a text without a cache it is the first half of what sinks and selected
    keys have places for.

    Raises:
        ValueError: the prompt does not fit into these places.
    """

    bidirectional: ClassVar[bool] = False

    def __call__(self, new: Arrivals) -> Tensor:
        scores = super().__call__(new)
        if new.cache is not None and not new.cache.empty:
            return scores
        prompt = new.places // 2
        if new.cache is not None:
            prompt = new.index.shape[1] if new.valid is None else int(new.valid.sum(-1).max())
        if prompt > new.places:
            raise ValueError(
                f"the selection keeps the whole prompt, and the {new.places} slots of a KV head for sinks and selected "
                f"keys (sinks + k) cannot hold its {prompt} tokens: give a larger budget"
            )
        return scores.masked_fill(new.index[:, None] < prompt, 2.0)  # all others are below 1
