"""Attend within each text of a packed batch: its rows hold several texts, one after the other.

No method knows of it. The texts are taken out of their rows and attended to as right-padded batches of texts of about
the same length, and the results are put back where the tokens stand. Padding is less than half of any such batch.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Batch:
    """Hold texts of about the same length.

    Attributes:
        tokens: `[N, L]` int64, where the tokens of each text stand in the rows laid end to end; behind the end of a
            text its last token is repeated.
        valid: `[N, L]` bool, False behind the end of a text; `None` where all are of one length.
    """

    tokens: Tensor
    valid: Tensor | None


class PackedTexts:
    """Hold which tokens of packed rows are one text.

    Args:
        numbers: `[B, T]` int64, the number of the text that each token belongs to; neighbours with the same number are
            one text, and no text goes on in the next row.

    Attributes:
        numbers: the same.
        shape: B and T.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.shape = numbers, tuple(numbers.shape)
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        starts = begins.flatten().nonzero().flatten()  # waits for the device, once for all layers
        lengths = starts.diff(append=starts.new_tensor([numbers.numel()]))
        sizes = torch.tensor([(length - 1).bit_length() for length in lengths.tolist()], device=numbers.device)
        self.batches = [_batch(starts[sizes == size], lengths[sizes == size]) for size in sizes.unique().tolist()]
        order = torch.cat([b.tokens.flatten() if b.valid is None else b.tokens[b.valid] for b in self.batches])
        self._place = order.argsort()

    def attend(
        self,
        attend: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor,
        scaling: float,
    ) -> Tensor:
        """Compute the attention of each text by itself.

        Args:
            attend: `SparseAttentionLayer.attend`.
            query: `[B, Hq, T, D]`, positions applied.
            key, value: `[B, Hkv, T, D]`.
            hidden_states: `[B, T, C]`.
            scaling: multiplies the logits.

        Returns:
            `[B, Hq, T, D]`.
        """
        states = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
        hidden, outputs = hidden_states.flatten(0, 1), []
        for batch in self.batches:
            tensors = (_rows(tensor, batch.tokens).transpose(1, 2) for tensor in states)
            options: dict[str, Any] = {"hidden_states": _rows(hidden, batch.tokens), "valid": batch.valid}
            output = attend(*tensors, **options, cache=None, scaling=scaling).transpose(1, 2)
            outputs.append(output.flatten(0, 1) if batch.valid is None else output[batch.valid])
        return torch.cat(outputs).index_select(0, self._place).unflatten(0, self.shape).transpose(1, 2)


class _Read(NamedTuple):
    """Hold marks that were read, and what tells whether they have been written to since.

    Attributes:
        marks: the tensor itself.
        version: how often it had been written to; `None` for a tensor of inference mode, where torch does not count.
        content: a copy of it where there is no version.
        texts: what it marks.
    """

    marks: weakref.ref[Tensor]
    version: int | None
    content: Tensor | None
    texts: PackedTexts

    def is_of(self, marks: Tensor, shape: tuple[int, int]) -> bool:
        """Tell whether these marks, in rows of this shape, are those that were read."""
        if self.marks() is not marks or self.texts.shape != shape:
            return False
        return marks._version == self.version if self.content is None else torch.equal(marks, self.content)


_newest: list[_Read] = []


def packed_texts(marks: Tensor, shape: tuple[int, int]) -> PackedTexts:
    """Return the texts of a packed batch; all layers of a forward have the same marks, and the first reads them.

    A buffer that the caller fills anew for each batch is read anew.

    Args:
        marks: `[B, T]` int64 as `PackedTexts` takes it; or `[N + 1]`, where each text of one row begins and the last
            one ends (`cu_seq_lens` of flash attention).
        shape: B and T.

    Raises:
        ValueError: boundaries that do not begin with 0, end with T and grow, or are of several rows.
    """
    for known in _newest[:1]:  # another thread may replace it meanwhile
        if known.is_of(marks, shape):
            return known.texts
    texts = PackedTexts(marks if marks.ndim == 2 else _numbers(marks, *shape))
    is_counted = not marks.is_inference()
    version, content = (marks._version, None) if is_counted else (None, marks.clone())
    _newest[:] = [_Read(weakref.ref(marks), version, content, texts)]
    return texts


def _numbers(boundaries: Tensor, rows: int, length: int) -> Tensor:
    """Return the number of the text of each token, `[1, T]`, given the boundaries of the texts."""
    if rows != 1:
        raise ValueError(f"packed sequences with cu_seq_lens are one row, got a batch of {rows}")
    values = boundaries.tolist()
    if len(values) < 2 or values[0] != 0 or values[-1] != length or values != sorted(values):
        shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        raise ValueError(f"cu_seq_lens must rise from 0 to the {length} tokens of the row, got [{shown}]")
    places = torch.arange(length, device=boundaries.device)
    return torch.searchsorted(boundaries.long(), places, right=True)[None]


def _batch(starts: Tensor, lengths: Tensor) -> _Batch:
    """Make a batch of texts, given where each of them begins and how long it is, `[N]` each."""
    places = torch.arange(int(lengths.max()), device=starts.device)
    valid = places < lengths[:, None]
    tokens = starts[:, None] + torch.minimum(places, lengths[:, None] - 1)
    return _Batch(tokens, None if bool(valid.all()) else valid)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the rows of `[M, ...]` at an index `[N, L]`."""
    return tensor.index_select(0, index.flatten()).unflatten(0, index.shape)
