"""Describe the state that a method keeps of one request, of a size that no text changes, and attention with it."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from hf_sparse.core.new_tokens import NewTokens, PackedTokens
from hf_sparse.core.prompt_chunks import ChunkGroup


class StateTensor(NamedTuple):
    """Describe one tensor of the state of a request; a pool holds it as `[rows, *shape]`.

    Attributes:
        name: what messages call it.
        shape: of the tensor of one request.
        dtype: of its numbers.
        fresh: what all its numbers are before the first token.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fresh: int = 0

    @property
    def nbytes(self) -> int:
        """Count the bytes of one request."""
        return prod(self.shape) * self.dtype.itemsize


class StateRows(NamedTuple):
    """Say where in a pool the states of the requests of a forward are.

    Attributes:
        states: `[rows, *shape]` for each tensor of `request_state`, in a dense order from the second dimension on.
        rows: `[B]` int64 or int32, the row of each request.
        sources: `[B]` of integers, the rows that the states are read from; where these are others, another tensor.
    """

    states: Sequence[Tensor]
    rows: Tensor
    sources: Tensor

    def of(self, requests: slice | Tensor) -> "StateRows":
        """Return where the states of some of the requests are; `requests` indexes `rows`."""
        rows = self.rows[requests]
        return StateRows(self.states, rows, rows if self.sources is self.rows else self.sources[requests])


class RequestAttention:
    """Attend with the tokens of requests whose states lie in rows of a pool: what a method can do that is served.

    By default the state of a request grows with its text, and there is no pool for it."""

    def request_state(self, head_dim: int, dtype: torch.dtype) -> tuple[StateTensor, ...] | None:
        """Describe the state of one request, which a pool holds a row for; `None` if it grows with the text.

        Tensors with larger numbers come first, so that those of a row can lie one after another in memory.

        Args:
            head_dim: size of a key or value of one head.
            dtype: of keys and values.
        """
        return None

    def shard(self, index: int, count: int) -> Self:
        """Return what one of `count` processes attends with that share the KV heads: the layer itself if it is one.

        Where there are more processes than KV heads, several have the same head.
        """
        if count == 1:
            return self
        raise NotImplementedError

    @property
    def dense_tokens(self) -> int:
        """Count the tokens up to which a text has dense attention, and nothing of it leaves the state of a request."""
        return 0

    def attend_chunk(self, at: StateRows, is_first: bool, new: NewTokens) -> Tensor:
        """Attend with the next tokens of one request, and write its state.

        Args:
            at: the row of the request.
            is_first: whether the text begins with these tokens; no state is then read.
            new: the tokens, `B` is 1, without padding.

        Returns:
            `[1, Hq, T, D]`.
        """
        raise NotImplementedError

    def attend_chunks(self, at: StateRows, chunks: ChunkGroup, packed: PackedTokens) -> Tensor:
        """Attend with the next tokens of several requests, and write their states.

        Args:
            at: the rows of the requests.
            chunks: lays the tokens side by side.
            packed: these tokens, among others.

        Returns:
            `[n, Hq, D]`, of the tokens of the pieces, `chunks.tokens`.
        """
        raise NotImplementedError

    def attend_steps(self, at: StateRows, new: NewTokens) -> Tensor:
        """Take a decoding step of several requests, and write their states.

        Args:
            at: the rows of the requests.
            new: one token of each.

        Returns:
            `[B, Hq, 1, D]`.
        """
        raise NotImplementedError
