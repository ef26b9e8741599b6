"""Scorers: one query-independent score per token and KV head, from the input of the attention module.

The input is layer-normalised once more, without parameters: hidden states grow about a hundredfold with depth, and
the score scale is the temperature of SparseK. A bias would do nothing, SparseK is shift invariant. Scores are
computed in float32 whatever the model's dtype: in bfloat16 most keys of a long text tie.

Parameters lie directly on the scorer, not on submodules: PEFT strips the adapter's name from the next-to-last part of
a key only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse.methods.sparsek.config import SparseKConfig


class Scorer(nn.Module):
    """`[B, T, C]` inputs of an attention module -> `[B, Hkv, T]` float32 scores."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            states = F.layer_norm(hidden_states.float(), hidden_states.shape[-1:])
            return self.score(states).transpose(1, 2).contiguous()

    def score(self, states: Tensor) -> Tensor:
        """`[B, T, C]` normalised states -> `[B, T, Hkv]`."""
        raise NotImplementedError


class LinearScorer(Scorer):
    def __init__(self, hidden_size: int, num_key_value_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_key_value_heads, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def score(self, states: Tensor) -> Tensor:
        return states @ self.weight.float().T


class MLPScorer(Scorer):
    def __init__(self, hidden_size: int, num_key_value_heads: int, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(width, hidden_size))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.down = nn.Parameter(torch.empty(num_key_value_heads, width))
        nn.init.normal_(self.up, std=hidden_size**-0.5)
        nn.init.normal_(self.down, std=width**-0.5)

    def score(self, states: Tensor) -> Tensor:
        return F.gelu(states @ self.up.float().T + self.up_bias.float()) @ self.down.float().T


def make_scorer(config: SparseKConfig, hidden_size: int, num_key_value_heads: int) -> Scorer:
    if config.scorer == "mlp":
        return MLPScorer(hidden_size, num_key_value_heads, config.scorer_hidden_size)
    return LinearScorer(hidden_size, num_key_value_heads)
