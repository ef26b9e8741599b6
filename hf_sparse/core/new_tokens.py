"""Hold the new tokens of one forward through an attention module: those of a batch, or of requests in a row."""

from typing import NamedTuple

from torch import Tensor


class NewTokens(NamedTuple):
    """Hold what `SparseAttentionLayer.attend` gets of the tokens of one forward.

    Attributes:
        query: `[B, Hq, T, D]`, positions applied.
        key, value: `[B, Hkv, Tk, D]`, what the cache returned: all keys where it keeps them, otherwise the new ones.
        hidden_states: `[B, T, C]`, the input of the attention module.
        valid: `[B, Tk]` bool, False for padding; `None` if every token is real.
        scaling: multiplies the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden_states: Tensor
    valid: Tensor | None
    scaling: float


class PackedTokens(NamedTuple):
    """Hold the new tokens of several requests, one after another, as an engine computes them together.

    Attributes:
        query: `[N, Hq, D]`, positions applied.
        key, value: `[N, Hkv, D]`.
        hidden_states: `[N, C]`, the input of the attention module.
        scaling: multiplies the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden_states: Tensor
    scaling: float

    def first_apart(self, count: int) -> NewTokens:
        """Return the first `count` tokens, each a row of its own: `B` is `count`, and `T` is 1."""
        q, k, v = (tensor[:count, :, None] for tensor in self[:3])
        return NewTokens(q, k, v, self.hidden_states[:count, None], None, self.scaling)

    def piece(self, begin: int, end: int) -> NewTokens:
        """Return the tokens from `begin` up to `end` as one row: `B` is 1."""
        q, k, v = (tensor[begin:end].transpose(0, 1)[None] for tensor in self[:3])
        return NewTokens(q, k, v, self.hidden_states[None, begin:end], None, self.scaling)
