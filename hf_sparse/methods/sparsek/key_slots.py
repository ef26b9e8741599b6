"""Put keys into slots, each with its score and its position, and attend to them.

What a key is follows from its position (sink, window or selected), so slots need no order. A key that is evicted can
never be selected again, for scores are frozen: nothing that the model could still want is lost.
"""

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.slot_memory import SlotMemory
from hf_sparse.ops.selection.next_slots import next_slots
from hf_sparse.ops.selection.slots import attend_slots, fill_slots, insert_token


class KeySlots(SlotMemory):
    """Choose which keys have slots, and attend to these; the attention of SparseK calls it with everything.

    Each token comes once, after it was counted (`SparseKCacheLayer.update`): the first ones of a text to `fill_whole`
    or `fill`, later ones to `insert` one at a time, or several to `fill` together with what the slots hold.
    """

    def ordered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys, values, scores and positions in the order of positions, empty slots first."""
        positions, order = self.positions.sort(dim=-1)
        columns = order[..., None]
        return (
            self.keys.gather(2, columns.expand_as(self.keys)),
            self.values.gather(2, columns.expand_as(self.values)),
            self.scores.gather(2, order),
            positions,
        )

    @torch.no_grad()
    def fill_whole(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Fill the slots, as `fill` does, with the first tokens of rows without padding.

        Args:
            keys, values: `[B, Hkv, N, D]`, `N` of any size.
            scores: `[B, Hkv, N]`.
        """
        if not self.is_initialized:
            self.begin_text(keys, values)
        end = None if self.call is None else self.call.end
        if end is None:
            self._fill_whole(keys, values, scores)
        else:
            self._fill_up_to(end, keys, values, scores)
        self.empty = False

    def _fill_up_to(self, end: Tensor, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Keep what `fill_whole` keeps of the tokens before `end`, `[1]` int64, without waiting for the device."""
        index = torch.arange(keys.shape[2], device=keys.device)
        positions = index.where(index < end, -1).expand(scores.shape)
        self._fill(keys, values, scores.masked_fill(positions < 0, 0), positions, end.expand(len(keys)))
        self.seen.copy_(end.expand_as(self.seen))
        self.cumulative_length.copy_(end[0])

    def _fill_whole(self, keys: Tensor, values: Tensor, scores: Tensor) -> None:
        """Write to the slots what `fill_whole` keeps, and count the tokens."""
        slots = (self.keys, self.values, self.scores, self.positions, self.seen)
        fill_slots(*slots, keys, values, scores, window=self.window, sinks=self.sinks)

    @torch.no_grad()
    def fill(self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, seen: Tensor) -> None:
        """Fill the slots with the sinks, the window and the best-scored other tokens that a later query can attend to.

        Args:
            keys, values: `[B, Hkv, N, D]`, `N` of any size, in the order of positions.
            scores, positions: `[B, Hkv, N]`; a position of -1 marks an entry that is not a token.
            seen: `[B]`, real tokens so far.
        """
        if not self.is_initialized:
            self.begin_text(keys, values)
        self.padded_late |= ((positions[:, 0] < 0) & (positions[:, 0].cummax(-1).values >= 0)).any(-1)
        self._fill(keys, values, scores, positions, seen)
        self.seen.copy_(seen)
        self.empty = False

    def _fill(self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, seen: Tensor) -> None:
        """Write to the slots what `fill` keeps."""
        kept = _entries_to_keep(scores, positions, seen, self.window, self.sinks, self.slots)
        count = kept.shape[-1]
        filled = positions.gather(2, kept)
        self.positions.fill_(-1)
        self.positions[:, :, :count] = filled
        self.scores[:, :, :count] = scores.gather(2, kept).float()
        columns = kept[..., None]
        for slots, source in ((self.keys, keys), (self.values, values)):
            kept_source = source.gather(2, columns.expand(-1, -1, -1, source.shape[-1]))
            slots[:, :, :count] = kept_source.masked_fill(filled[..., None] < 0, 0)  # padding may be anything

    @torch.no_grad()
    def insert(self, key: Tensor, value: Tensor, score: Tensor, valid: Tensor | None) -> None:
        """Take the next token of each row into an empty slot, or into that of the weakest key outside the window.

        Args:
            key, value: `[B, Hkv, 1, D]`.
            score: `[B, Hkv, 1]`.
            valid: `[B]` bool, rows whose token is real; `None` if all are.
        """
        if not self.is_initialized:
            self.begin_text(key, value)
        if valid is not None:
            self.padded_late.logical_or_(~valid & (self.seen > 0))
        self._insert(key, value, score, valid)
        self.seen.add_(1 if valid is None else valid.long())
        self.empty = False

    @torch.no_grad()
    def pin(self) -> None:
        """Keep what the slots hold now for good: no score is as high as theirs."""
        self.scores.masked_fill_(self.positions >= 0, torch.inf)

    def _insert(self, key: Tensor, value: Tensor, score: Tensor, valid: Tensor | None) -> None:
        """Write the next token to its slot."""
        slots = (self.keys, self.values, self.scores, self.positions)
        insert_token(*slots, self.seen, key, value, score, valid, window=self.window, sinks=self.sinks)

    def attend(self, query: Tensor, *, scaling: float, is_full: bool = False) -> Tensor:
        """Attend with the one new query of each row to all filled slots, see `ops.selection.slots.attend_slots`.

        Args:
            query: `[B, Hq, 1, D]`.
            scaling: multiplies the logits.
            is_full: no slot is empty.
        """
        positions = None if is_full else self.positions
        return attend_slots(query, self.keys, self.values, positions, scaling=scaling)

    def next_slots(self, count: int) -> Tensor:
        """Return the slots of the next `count` tokens, `[B, Hkv, count]`, as indices into all slots of a row."""
        slots = next_slots(self.scores, self.positions, self.seen, count, window=self.window, sinks=self.sinks)
        return slots + torch.arange(slots.shape[1])[:, None] * self.slots

    def by_head(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Return the part `[B, S, ...]` of each KV head of a tensor that has a place for every slot."""
        return slots.unbind(1)


def _entries_to_keep(scores: Tensor, positions: Tensor, seen: Tensor, window: int, sinks: int, slots: int) -> Tensor:
    """Return the indices `[B, Hkv, min(N, slots)]` of the entries to keep, in the order of positions."""
    always_kept = (positions >= seen[:, None, None] - window) | (positions < sinks)
    priority = scores.masked_fill(always_kept, torch.inf).masked_fill(positions < 0, -torch.inf)
    order = priority.argsort(dim=-1, descending=True, stable=True)[..., :slots]
    return order.sort(dim=-1).values
