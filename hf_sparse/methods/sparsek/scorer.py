"""Compute one query-independent score per token and KV head, from the input of the attention module.

The input is layer-normalised once more, without parameters: hidden states grow about a hundredfold with depth, and
the score scale is the temperature of SparseK. A bias would do nothing, SparseK is shift invariant. Scores are computed
in float64 (`hf_sparse.ops.selection.linear_scores` says why) and are float32 whatever the model's dtype: in
bfloat16 most keys of a long text tie.

Copies of the input in float64 would take much memory: linear scores on a GPU make none, and of all others the backward
keeps the input alone and computes the scores again, and long texts are scored piece by piece.

Parameters lie directly on the scorer, not on submodules: PEFT strips the adapter's name from the next-to-last part of
a key only.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_sparse.methods.sparsek.settings import SparseKSettings
from hf_sparse.ops.selection.linear_scores import (
    Slopes,
    has_kernels,
    linear_scores,
    normalised,
    slope_positions,
    token_scores,
)

_PIECE = 1 << 24  # numbers of the input that are scored at a time
SLOPE_TOKENS = 256  # a learned slope is stored per so many tokens, so that it moves at the pace of the weights
NO_SLOPES = Slopes(0.0, 1, 0)

Linear = tuple[Tensor | None, Tensor | None, Slopes]  # weight, slope and slopes, see `Scorer.linear`


class Scorer(nn.Module):
    """Map inputs `[B, T, C]` of an attention module, which stand at `index` `[B, T]`, to scores `[B, Hkv, T]` float32.

    A slope per token of absolute position is added: the same for all heads, and what each head has learned. With a
    `slope_length`, positions count by their logarithm in the end (`ops.selection.linear_scores.slope_positions`).

    Attributes:
        by_head: the parameters `[Hkv, ...]`.
        config: the settings of the adapter, of which training may set `slope_length`.
    """

    by_head = ("slope", "weight", "down")

    def __init__(self, config: SparseKSettings, num_key_value_heads: int, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.slope = nn.Parameter(torch.zeros(num_key_value_heads)) if config.learn_slope and causal else None

    @property
    def slopes(self) -> Slopes:
        """Return how scores rise with the position."""
        return Slopes(float(self.config.position_slope), SLOPE_TOKENS, self.config.slope_length or 0)

    @property
    def linear(self) -> Linear:
        """Return weight `[Hkv, C]`, slope `[Hkv]` and slopes, with which the kernels of steps score an input.

        Without a weight they take the scores themselves.
        """
        return None, None, NO_SLOPES

    def forward(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        """Return the scores `[B, Hkv, T]` float32 of inputs `[B, T, C]` at `index` `[B, T]`."""
        device = hidden_states.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            scores = self._in_pieces(hidden_states)
        slopes = self.slopes
        slope: float | Tensor = slopes.position_slope
        if self.slope is not None:
            slope = slope + self.slope.to(scores.dtype)[:, None] / SLOPE_TOKENS
        if isinstance(slope, Tensor) or slope:
            scores = scores + slope_positions(index, slopes.length)[:, None] * slope
        return scores.float().contiguous()

    def keep_heads(self, first: int, count: int) -> None:
        """Keep the parameters of `count` KV heads from the head `first` on, and score for those alone."""
        for name, parameter in self.named_parameters():
            if name in self.by_head:
                kept = parameter.detach()[first : first + count].clone()
                self.register_parameter(name, nn.Parameter(kept, requires_grad=parameter.requires_grad))

    def _in_pieces(self, hidden_states: Tensor) -> Tensor:
        """Return the scores `[B, Hkv, T]` of inputs `[B, T, C]`, without slopes, in little memory."""
        tokens = max(1, _PIECE // max(1, hidden_states[:, :1].numel()))
        if hidden_states.shape[1] <= tokens:
            return self._score_piece(hidden_states)
        return torch.cat([self._score_piece(piece) for piece in hidden_states.split(tokens, 1)], 2)

    def _score_piece(self, hidden_states: Tensor) -> Tensor:
        """Return the scores of inputs that fit into memory; the backward computes them again."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled code decides what to keep
            return _Recomputed.apply(self.score, hidden_states, *self.parameters())
        return self.score(hidden_states)

    def score(self, hidden_states: Tensor) -> Tensor:
        """Return the scores `[B, Hkv, T]` of inputs `[B, T, C]` in the dtype that `normalised` gives them."""
        raise NotImplementedError


class _Recomputed(torch.autograd.Function):
    """Call `compute(states)` in the forward, and again in the backward, which takes less memory than its inner results.

    The parameters that `compute` uses are arguments too, so that autograd gives them a gradient.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, compute: Callable[[Tensor], Tensor], states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.compute, ctx.parameters = compute, parameters  # type: ignore[attr-defined]
        ctx.save_for_backward(states, *parameters)  # the parameters to notice if they change before the backward
        return compute(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states = ctx.saved_tensors[0]
        inputs = (states.detach().requires_grad_(), *ctx.parameters)
        learned = [x for x, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        with torch.enable_grad(), torch.autocast(states.device.type, enabled=False):
            gradients = iter(torch.autograd.grad(ctx.compute(inputs[0]), learned, grad, allow_unused=True))
        return None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[1:])


class LinearScorer(Scorer):
    """Learn one weight per input feature and KV head, `weight` `[Hkv, C]`."""

    def __init__(self, config: SparseKSettings, hidden_size: int, num_key_value_heads: int, causal: bool) -> None:
        super().__init__(config, num_key_value_heads, causal)
        self.weight = nn.Parameter(torch.empty(num_key_value_heads, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def linear(self) -> Linear:
        """Return weight, slope and slopes, see `Scorer.linear`."""
        return self.weight, self.slope, self.slopes

    def forward(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        """Return the scores of inputs as `Scorer.forward`, without a gradient in one launch where kernels run."""
        if torch.is_grad_enabled() or not has_kernels(hidden_states):
            return super().forward(hidden_states, index)
        return token_scores(hidden_states, self.weight, self.slope, index, self.slopes)

    def _in_pieces(self, hidden_states: Tensor) -> Tensor:
        return self.score(hidden_states) if has_kernels(hidden_states) else super()._in_pieces(hidden_states)

    def score(self, hidden_states: Tensor) -> Tensor:
        """Return the scores of inputs, see `Scorer.score`."""
        return linear_scores(hidden_states, self.weight)


class MLPScorer(Scorer):
    """Learn a hidden layer of `scorer_hidden_size` with GELU, the same for all KV heads of a layer."""

    def __init__(self, config: SparseKSettings, hidden_size: int, num_key_value_heads: int, causal: bool) -> None:
        super().__init__(config, num_key_value_heads, causal)
        width = config.scorer_hidden_size
        self.up = nn.Parameter(torch.empty(width, hidden_size))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.down = nn.Parameter(torch.empty(num_key_value_heads, width))
        nn.init.normal_(self.up, std=hidden_size**-0.5)
        nn.init.normal_(self.down, std=width**-0.5)

    def score(self, hidden_states: Tensor) -> Tensor:
        """Return the scores of inputs, see `Scorer.score`."""
        states = normalised(hidden_states)
        up, bias, down = (p.to(states.dtype) for p in (self.up, self.up_bias, self.down))
        return (F.gelu(states @ up.T + bias) @ down.T).transpose(1, 2)


def make_scorer(config: SparseKSettings, hidden_size: int, num_key_value_heads: int, causal: bool) -> Scorer:
    """Make the scorer that a configuration names, for inputs of `hidden_size`."""
    kind = MLPScorer if config.scorer == "mlp" else LinearScorer
    return kind(config, hidden_size, num_key_value_heads, causal)
