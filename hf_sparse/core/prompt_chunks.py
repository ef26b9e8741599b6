"""Describe pieces of prompts, and put several side by side, so that one operation takes all of them.

The host knows how long they are. Unlike the texts of `packed_texts`, they are found without waiting for the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Pieces side by side differ in length by less than this factor. A CPU is slowed down by padding more than by groups.
_MOST_PADDING = {"cpu": 1.2, "cuda": 2.0}
#: Queries of a group times the keys that the longest piece may meet: logits of each query head, if they are in memory.
_MOST_LOGITS = 1 << 22


@dataclass(frozen=True)
class Chunk:
    """Describe a piece of the prompt of one request.

    Attributes:
        begin, end: where its tokens lie in the packed batch.
        before: number of the tokens of the text before it, 0 where the text begins.
    """

    begin: int
    end: int
    before: int = 0

    @property
    def length(self) -> int:
        """Return the number of its tokens."""
        return self.end - self.begin

    @property
    def context(self) -> int:
        """Return the number of tokens of the text up to its end."""
        return self.before + self.length


@dataclass(frozen=True)
class ChunkGroup:
    """Hold pieces of prompts side by side, each in the first places of a row of `[B, T]`.

    Attributes:
        is_first: whether the texts begin with these pieces; otherwise all go on.
        is_dense: whether nothing of the texts has been evicted at their ends.
        most_context: tokens of the longest of the texts up to its piece's end.
        members: `[B]` int64, the number of each request in its batch.
        before: `[B]` int64, tokens of each text before its piece.
        lengths: `[B]` int64, tokens of each piece.
        table: `[B, T]` int64, the packed token in each place; the last one of the row in the places behind it.
        places: `[n]` int64, the places with a token of their own, as indices into all `B * T`.
        tokens: `[n]` int64, the packed token in each of these.
        row: `[n]` int64, the row of each.
        index: `[n]` int64, the position of each in its text.
    """

    is_first: bool
    is_dense: bool
    most_context: int
    members: Tensor
    before: Tensor
    lengths: Tensor
    table: Tensor
    places: Tensor
    tokens: Tensor
    row: Tensor
    index: Tensor

    @classmethod
    def of(
        cls, chunks: Sequence[Chunk], members: Sequence[int], dense_tokens: int, device: torch.device
    ) -> "ChunkGroup":
        """Put pieces side by side.

        The tables are made on the host and sent together; on a GPU nothing waits for it.

        Args:
            chunks: the pieces, all with something before them or all without.
            members: the number of each request in its batch.
            dense_tokens: see `SparseAttentionLayer.dense_tokens`.
            device: of the tables.
        """
        begin, before, lengths = (
            torch.tensor(numbers)
            for numbers in zip(*[(chunk.begin, chunk.before, chunk.length) for chunk in chunks], strict=True)
        )
        offset = torch.arange(int(lengths.max()))
        table = begin[:, None] + torch.minimum(offset, lengths[:, None] - 1)
        places = (offset < lengths[:, None]).flatten().nonzero()[:, 0]
        row = torch.arange(len(chunks)).repeat_interleave(lengths)
        index = (before[:, None] + offset).flatten()[places]
        parts = {
            "members": torch.tensor(members),
            "before": before,
            "lengths": lengths,
            "table": table.flatten(),
            "places": places,
            "tokens": table.flatten()[places],
            "row": row,
            "index": index,
        }
        numbers = torch.cat(list(parts.values()))
        if device.type == "cuda":
            numbers = numbers.pin_memory().to(device, non_blocking=True)
        sent = numbers.split([len(part) for part in parts.values()])
        tables = dict(zip(parts, sent, strict=True))
        tables["table"] = tables["table"].view(table.shape)
        most_context = max(chunk.context for chunk in chunks)
        return cls(chunks[0].before == 0, most_context <= dense_tokens, most_context, **tables)

    @property
    def valid(self) -> Tensor | None:
        """Return `[B, T]` bool, False behind the piece of each row; `None` if all fill their rows."""
        if len(self.places) == self.table.numel():
            return None
        return torch.arange(self.table.shape[1], device=self.table.device) < self.lengths[:, None]

    def padded(self, tensor: Tensor) -> Tensor:
        """Put packed tokens side by side: `[N, H, D]` -> `[B, H, T, D]`, or `[N, C]` -> `[B, T, C]`."""
        rows = tensor[self.table]
        return rows.transpose(1, 2) if rows.ndim == 4 else rows

    def packed(self, rows: Tensor) -> Tensor:
        """Return what stands at the tokens, `[B, H, T, D]` -> `[n, H, D]`."""
        return rows.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


def groups_of(chunks: Sequence[Chunk], dense_tokens: int, device: torch.device) -> Iterator[list[int]]:
    """Yield the numbers of pieces that are best read together: of one kind, and of about the same length.

    Args:
        chunks: of a batch.
        dense_tokens: see `SparseAttentionLayer.dense_tokens`.
        device: that reads them.
    """
    most_padding = _MOST_PADDING.get(device.type, 2.0)

    def order(number: int) -> tuple[bool, bool, int]:
        chunk = chunks[number]
        return chunk.before == 0, chunk.context <= dense_tokens, -chunk.length

    def met(number: int) -> int:
        return min(chunks[number].before, dense_tokens) + chunks[number].length

    group: list[int] = []
    keys = 0
    for number in sorted(range(len(chunks)), key=order):
        if group:
            longest, chunk = chunks[group[0]], chunks[number]
            fits = order(number)[:2] == order(group[0])[:2] and longest.length < most_padding * chunk.length
            if not fits or (len(group) + 1) * longest.length * max(keys, met(number)) > _MOST_LOGITS:
                yield group
                group = []
        group.append(number)
        keys = max(keys, met(number)) if len(group) > 1 else met(number)
    if group:
        yield group
