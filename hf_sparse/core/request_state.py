"""Describe the state that a method keeps of one request, of a size that no text changes, and attention with it."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

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

    def attend_chunk(
        self,
        states: Sequence[Tensor],
        row: Tensor,
        source: Tensor,
        is_first: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attend with the next tokens of one request, and write its state.

        Tensors are as in `SparseAttentionLayer.attend`, with `B` 1.

        Args:
            states: `[rows, *shape]` for each tensor of `request_state`, in a dense order from the second dimension on.
            row: `[1]` int64, the row of the request.
            source: `[1]` int64, the row that its state is read from, mostly the same.
            is_first: whether the text begins with these tokens; no state is then read.
        """
        raise NotImplementedError

    def attend_chunks(
        self,
        states: Sequence[Tensor],
        rows: Tensor,
        sources: Tensor,
        chunks: ChunkGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attend with the next tokens of several requests, and write their states.

        Args:
            states: as for `attend_chunk`.
            rows: `[B]` of integers, the row of each request.
            sources: `[B]` of integers, the rows that the states are read from; where they are others, another tensor.
            chunks: lays the tokens side by side.
            query: `[N, Hq, D]`; key, value: `[N, Hkv, D]`; hidden_states: `[N, C]`, packed tokens.
            scaling: multiplies the logits.

        Returns:
            `[n, Hq, D]`, of the tokens of the pieces, `chunks.tokens`.
        """
        raise NotImplementedError

    def attend_steps(
        self,
        states: Sequence[Tensor],
        rows: Tensor,
        sources: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Take a decoding step of several requests, and write their states.

        Tensors are as in `SparseAttentionLayer.attend`.

        Args:
            states: as for `attend_chunk`.
            rows: `[B]` int64, the row of each request.
            sources: `[B]` int64, the rows that the states are read from, mostly the same.
        """
        raise NotImplementedError
