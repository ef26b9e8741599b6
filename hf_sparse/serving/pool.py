"""Hold the states of many requests in the rows of a pool, and attend with a batch that mixes prompts and steps.

An engine decides which tokens are computed together. It packs them one after another, the requests that decode one
token each first, then pieces of prompts, and says with a `Batch` whose they are. A row is all that a request ever takes
up, whatever its length; a row that was freed is overwritten by the next request that gets it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.new_tokens import PackedTokens
from hf_sparse.core.prompt_chunks import Chunk, ChunkGroup, groups_of
from hf_sparse.core.request_state import StateRows, StateTensor


@dataclass(frozen=True)
class Batch:
    """Describe packed tokens.

    Attributes:
        rows: `[requests]` int64 or int32, the row of each request in the pool: first those that decode one token each,
            then those with a piece of a prompt.
        steps: number of those that decode. Their tokens are the first ones.
        chunks: the pieces of prompts, in the order of `rows`.
        sources: `[requests]` int64, the rows that states are read from; by default `rows`. So a text can go on from
            the state of another one, which stays.
    """

    rows: Tensor
    steps: int
    chunks: tuple[Chunk, ...] = ()
    sources: Tensor | None = None
    _groups: dict[int, list[tuple[int, Chunk] | ChunkGroup]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def groups(self, dense_tokens: int) -> list[tuple[int, Chunk] | ChunkGroup]:
        """Divide the pieces of prompts into those to read side by side, and single ones with the number of the request.

        They are remembered, for layers ask the same one after another.

        Args:
            dense_tokens: see `SparseAttentionLayer.dense_tokens`.
        """
        if dense_tokens not in self._groups:
            self._groups[dense_tokens] = list(self._grouped(dense_tokens))
        return self._groups[dense_tokens]

    def _grouped(self, dense_tokens: int) -> Iterator[tuple[int, Chunk] | ChunkGroup]:
        for numbers in groups_of(self.chunks, dense_tokens, self.rows.device):
            chunks = [self.chunks[number] for number in numbers]
            members = [self.steps + number for number in numbers]
            if len(chunks) == 1 and (chunks[0].before == 0 or chunks[0].context > dense_tokens):
                yield members[0], chunks[0]
            else:
                yield ChunkGroup.of(chunks, members, dense_tokens, self.rows.device)


def state_of_request(attention: SparseAttentionLayer, head_dim: int, dtype: torch.dtype) -> tuple[StateTensor, ...]:
    """Describe the state of one request in one layer.

    Args:
        attention: of the layer.
        head_dim: size of a key or value of one head.
        dtype: of keys and values.

    Raises:
        ValueError: it grows with the text.
    """
    state = attention.request_state(head_dim, dtype)
    if state is None:
        raise ValueError(
            f"{attention.label} keeps every key, so the state of a request grows with its text: it cannot be served "
            "from rows of a fixed size"
        )
    return state


def begin_rows(state: Sequence[StateTensor], states: Sequence[Tensor], rows: Tensor) -> None:
    """Make rows of one layer ready for new texts whose first tokens come as steps.

    A first chunk reads nothing of its row and needs no call.

    Args:
        state: describes the tensors, see `state_of_request`.
        states: `[rows, *shape]` for each of them.
        rows: `[requests]` of integers.
    """
    for part, tensor in zip(state, states, strict=True):
        tensor.index_fill_(0, rows.long(), part.fresh)


@torch.no_grad()
def attend_packed(
    attention: SparseAttentionLayer,
    states: Sequence[Tensor],
    batch: Batch,
    packed: PackedTokens,
    output: Tensor | None = None,
) -> Tensor:
    """Attend with packed tokens in one layer, and write the states of their requests.

    Args:
        attention: of the layer.
        states: `[rows, *shape]` for each tensor of a state, see `SparseAttentionLayer.request_state`.
        batch: says whose the tokens are; those behind its last one belong to nobody and are left alone.
        packed: the tokens, `N` of them.
        output: `[N, Hq, D]` to write to; by default a new tensor.

    Returns:
        `[N, Hq, D]`.
    """
    query = packed.query
    is_plain = output is None and not batch.chunks and batch.steps == len(query)
    result = query if is_plain else torch.zeros_like(query) if output is None else output
    at = StateRows(states, batch.rows, batch.rows if batch.sources is None else batch.sources)
    if batch.steps:
        attended = attention.attend_steps(at.of(slice(batch.steps)), packed.first_apart(batch.steps))[:, :, 0]
        if is_plain:
            return attended
        result[: batch.steps] = attended
    for group in batch.groups(attention.dense_tokens):
        if isinstance(group, ChunkGroup):
            result.index_copy_(0, group.tokens, attention.attend_chunks(at.of(group.members), group, packed))
            continue
        number, chunk = group
        is_first, piece = chunk.before == 0, packed.piece(chunk.begin, chunk.end)
        attended = attention.attend_chunk(at.of(slice(number, number + 1)), is_first, piece)
        result[chunk.begin : chunk.end] = attended[0].transpose(0, 1)
    return result


class RowPool:
    """Hold the states of requests in all layers of a model, a row for each request.

    Attributes:
        attentions: the sparse attention of each layer.
        layers: for each layer the tensors `[rows, *shape]` of a state.
        rows: how many requests fit.
    """

    def __init__(
        self,
        attentions: Sequence[SparseAttentionLayer],
        head_dim: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if rows < 1:
            raise ValueError(f"a pool has at least one row, got {rows}")
        self.attentions, self.rows = tuple(attentions), rows
        self.state = [state_of_request(attention, head_dim, dtype) for attention in self.attentions]
        self.layers = [
            [torch.zeros((rows, *part.shape), dtype=part.dtype, device=device) for part in parts]
            for parts in self.state
        ]
        self._free = list(range(rows - 1, -1, -1))

    @property
    def nbytes_of_row(self) -> int:
        """Count the bytes that one request takes up in all layers."""
        return sum(part.nbytes for parts in self.state for part in parts)

    @property
    def free_rows(self) -> int:
        """Count the requests that fit in yet."""
        return len(self._free)

    def take(self) -> int:
        """Give a new request its row, whose first chunk overwrites what the row holds.

        Raises:
            RuntimeError: all rows are taken.
        """
        if not self._free:
            raise RuntimeError(f"all {self.rows} rows of the pool are taken: free one first")
        return self._free.pop()

    def free(self, row: int) -> None:
        """Take the row of a request that ended back.

        Raises:
            ValueError: it was not taken.
        """
        if not 0 <= row < self.rows or row in self._free:
            raise ValueError(f"row {row} of {self.rows} was not taken")
        self._free.append(row)

    def snapshot(self, row: int) -> list[list[Tensor]]:
        """Copy the state of a request: what all texts with the same beginning can go on from."""
        return [[state[row].clone() for state in states] for states in self.layers]

    def restore(self, row: int, snapshot: list[list[Tensor]]) -> None:
        """Write a copied state into the row of a request, whose next chunk is then not its first."""
        for states, copies in zip(self.layers, snapshot, strict=True):
            for state, copy in zip(states, copies, strict=True):
                state[row].copy_(copy)

    def attend(
        self,
        layer: int,
        batch: Batch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attend with packed tokens in one layer; see `attend_packed`."""
        packed = PackedTokens(query, key, value, hidden_states, scaling)
        return attend_packed(self.attentions[layer], self.layers[layer], batch, packed)
