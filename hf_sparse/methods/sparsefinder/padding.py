"""Move a padded batch so that each text begins at position 0: its tiles are those of the text alone.

Real tokens move to the front. In a causal model the padding behind them is the future, which no query sees; new tokens
of different rows stand at different positions then. Nothing here waits for the device.
"""

import torch
from torch import Tensor


class PackedBatch:
    """Hold the rows of a padded batch, packed.

    Attributes:
        valid: `[B, Tk]` bool, the tokens that exist after packing: the first ones of each row.
        first_query: `[B]` int64, position of the first query of each row, where a tile of queries begins if there are
            several; None where the queries are whole texts.
    """

    def __init__(self, valid: Tensor, queries: int, rows: int, place: Tensor | None = None) -> None:
        """Pack a batch.

        Args:
            valid: `[B, Tk]` bool, False for padding.
            queries: `Tq`, the last columns.
            rows: queries per tile.
            place: `[1]` int64, the column of the only query, if not the last one: what is behind it is not valid.
        """
        keys = valid.shape[1]

        def of_queries(columns: Tensor) -> Tensor:
            return columns[:, keys - queries :] if place is None else columns.index_select(1, place)

        count, self._new = valid.sum(-1), of_queries(valid)
        self._order = (~valid).byte().argsort(dim=-1, stable=True)
        self.valid = torch.arange(keys, device=valid.device) < count[:, None]
        self.first_query: Tensor | None = None
        self._slots = queries
        slot = of_queries(valid.cumsum(-1)) - 1  # positions of the queries
        if queries < keys:
            first = count - self._new.sum(-1)
            if queries > 1:
                first = first // rows * rows
                self._slots = ((queries + rows - 2) // rows + 1) * rows  # wherever in a tile they begin
            self.first_query, slot = first, slot - first[:, None]
        self._slot = slot.masked_fill(~self._new, self._slots)

    def keys(self, tensor: Tensor, padding: float = 0) -> Tensor:
        """Pack what there is of each token, `[B, H, Tk, X]`, with `padding` behind it."""
        packed = tensor.gather(2, _index(self._order, tensor))
        return packed.masked_fill(~self.valid[:, None, :, None], padding)

    def queries(self, tensor: Tensor) -> Tensor:
        """Put queries `[B, H, Tq, X]` where `first_query` says, `[B, H, T, X]`, zeros where there is none."""
        shape = (*tensor.shape[:2], self._slots + 1, tensor.shape[3])  # the last takes what is padding
        return tensor.new_zeros(shape).scatter(2, _index(self._slot, tensor), tensor)[:, :, :-1]

    def unpack(self, output: Tensor) -> Tensor:
        """Put outputs `[B, H, T, X]` back, `[B, H, Tq, X]`, zeros at padding."""
        unpacked = output.gather(2, _index(self._slot.clamp(max=self._slots - 1), output))
        return unpacked.masked_fill(~self._new[:, None, :, None], 0)


def _index(position: Tensor, tensor: Tensor) -> Tensor:
    """Expand `[B, T]` over heads and features."""
    return position[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
