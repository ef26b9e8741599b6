"""Score a key by itself, after rotary positions as it is cached."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.methods.sparsek.baselines.baseline import Arrivals, Baseline


@dataclass(frozen=True)
class KeyNorm(Baseline):
    """Keep keys of the smallest L2 norm (Devoto et al. 2024, 2406.11430).

    Norms are rounded to 12 bits: in the first layer, occurrences of one token differ by their rotation alone, and last
    bits, which a prefill and a decoding step compute differently, must not decide which of them stays.
    """

    def __call__(self, new: Arrivals) -> Tensor:
        mantissa, exponent = torch.frexp(new.key.detach().float().norm(dim=-1))
        return -torch.ldexp((mantissa * 4096).round() / 4096, exponent)


@dataclass(frozen=True)
class KeyDifference(Baseline):
    """Keep keys least like the average key: KeyDiff (Park et al. 2025, 2504.15364).

    A score is minus the cosine of the key to an anchor, the mean of normalised keys. In the paper the anchor is the
    mean of the keys that are cached when it evicts, and scores change with it. Here it is the mean of all keys of the
    row so far, the key's own included, so that scores are frozen and causal.
    """

    depends_on_text: ClassVar[bool] = True

    def __call__(self, new: Arrivals) -> Tensor:
        # The sum is float64, so that chunks and single steps agree with one pass.
        dtype = torch.float32 if new.key.device.type == "mps" else torch.float64
        unit = F.normalize(new.key.detach().to(dtype), dim=-1)
        if new.valid is not None:
            unit = unit.masked_fill(~new.valid[:, None, :, None], 0.0)
        total = unit.cumsum(2)  # the direction of the mean
        if new.cache is not None:
            if new.cache.memory is not None:
                total = total + new.cache.memory.unsqueeze(2)
            new.cache.remember(total[:, :, -1])
        return -(unit * F.normalize(total, dim=-1)).sum(-1).float()
