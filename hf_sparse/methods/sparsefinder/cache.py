"""Keep all keys and values, as an ordinary cache, and beside them the codes that the graph is predicted from.

Where nothing is learned, a text grows token by token in tensors with room for more, so that a step copies no key of the
tokens before it. A step whose kernels write the newest key and value themselves finds them in `newest`.

A code (clusters, bins or the projected point) is a function of its token alone, so a token keeps it for as long as it
stays. Queries keep theirs too: those of a few tokens describe the tile of queries that comes next.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.core.cache import GrowingCacheLayer, mask_of_keys
from hf_sparse.methods.sparsefinder.rooms import (
    copy_tokens,
    extended,
    lies_in,
    room_behind,
    rooms_like,
    with_room,
)
from hf_sparse.ops.triton import available

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.step import ClusterPlan, ExactPlan

_PIECE = 1 << 26  # bytes of several layers that lie, and later go, together after a recorded prompt


class SparsefinderCacheLayer(GrowingCacheLayer):
    """Keep the codes of all tokens beside their keys and values.

    Attributes:
        keys, values: `[B, Hkv, T, D]`.
        query_codes, key_codes: `[B, Hq, T, c]` and `[B, Hkv, T, c]`, int64 or float32; `None` before the first, and
            for a predictor without codes.
        owner: whose codes these are; those of two predictors do not compare.
        newest: key and value `[B, Hkv, 1, D]` of the last token, where they are still to be written to `keys` and
            `values`; see `write_newest`.
        checked: layout of the query of the last step that kernels took.
        rooms: what `keys` and `values` lie in, with room for more tokens; `None` where they lie in nothing larger.
        place: `[1]` int64, where the newest token goes while a step is recorded; `None` otherwise.
        is_dense: whether attention was dense when the last tokens came: of a recorded step, only a mask then tells it
            which keys are to come.
        plan: what the steps of this layer have in common, see `hf_sparse.methods.sparsefinder.step`.
    """

    is_dense = False

    def __init__(self) -> None:
        super().__init__()
        self.query_codes: Tensor | None = None
        self.key_codes: Tensor | None = None
        self.owner: object = None
        self.newest: tuple[Tensor, Tensor] | None = None
        self.plan: ExactPlan | ClusterPlan | None = None
        self.checked: tuple[Any, ...] | None = None
        self.rooms: tuple[Tensor, Tensor] | None = None
        self.place: Tensor | None = None
        self._query_room: Tensor | None = None
        self._key_room: Tensor | None = None
        self._may_wait = False
        self._grown: tuple[Tensor, Tensor] | None = None  # what the last step returned
        self._kind: tuple[Any, ...] | None = None  # of its token

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what only this layer may write to, and what it can make again."""
        self.write_newest()
        names = ("plan", "rooms", "_query_room", "_key_room", "_grown")
        state = vars(self) | dict.fromkeys(names)
        for name in ("keys", "values"):  # what lies in one piece of memory with other layers would be copied with them
            part = state[name]
            if isinstance(part, Tensor) and part.untyped_storage().nbytes() > part.nbytes:
                state[name] = part.clone()
        return state

    def begin_attention(self) -> None:
        """Note that sparse attention follows the next `update`, which can leave writing to it."""
        self._may_wait = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.place is not None:
            return self._update_recorded(key_states, value_states)
        self.write_newest()
        may_wait, self._may_wait = self._may_wait, False
        self.is_dense = not may_wait
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._grows(key_states, value_states):
            self.rooms = self._grown = self.plan = None  # or the earlier tensors stay in memory
            if self.call is not None and self.call.end is not None:  # `copy_texts` will copy them
                return self._take(key_states, value_states)
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.rooms is not None
        length = self.keys.shape[2] + 1
        keys, values = self.rooms
        self.keys, self.values = self._grown = keys.narrow(2, 0, length), values.narrow(2, 0, length)
        self.newest = key_states, value_states
        if not (may_wait and available(key_states.device)):
            self.write_newest()
        return self._grown

    def _grows(self, key: Tensor, value: Tensor) -> bool:
        """Tell whether one token comes to others of the same kind, and see to it that there is room for it."""
        kind = (key.shape, value.shape, key.stride(), value.stride(), key.dtype, value.dtype, key.device, type(key))
        grown, rooms = self._grown, self.rooms
        is_next = grown is not None and self.keys is grown[0] and self.values is grown[1] and kind == self._kind
        if is_next and rooms is not None and grown is not None and grown[0].shape[2] < rooms[0].shape[2]:
            return True
        old_key, old_value = self.keys, self.values
        if key.shape[2] != 1 or not self.is_initialized or old_key is None or old_value is None or old_key.ndim != 4:
            return False
        is_same = (
            type(key) is type(old_key) is Tensor
            and (old_key.dtype, old_value.dtype, old_key.device) == (key.dtype, value.dtype, key.device)
            and old_key.shape[:2] == key.shape[:2]
            and old_key.shape[2] > 0
        )
        if not is_same:
            return False
        rooms = self.rooms
        if rooms is None or rooms[0].shape[2] == old_key.shape[2] or not all(map(lies_in, (old_key, old_value), rooms)):
            tokens = with_room(old_key.shape[2])
            self.rooms = room_behind(old_key, tokens), room_behind(old_value, tokens)
        self._kind, self.checked = kind, None
        return True

    def _take(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Hold keys and values `[B, Hkv, T, D]` of whole texts as they are, and return them."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values

    # What recorded prompts and recorded steps ask for, see `RecordableCacheLayer`.

    @staticmethod
    def copy_texts(
        sources: Sequence["SparsefinderCacheLayer"],
        targets: Sequence["SparsefinderCacheLayer"],
        tokens: int,
        room: int | None = None,
    ) -> None:
        """Copy keys and values of all layers of a cache to those of another one, see `RecordableCacheLayer`.

        Args:
            sources: layers without codes, which hold `tokens` tokens or more.
            targets: as many; none of them holds anything yet, or all have room for the tokens.
            tokens: of each text.
            room: tokens that targets shall have room for if they hold nothing yet; `None` for those that a step would
                make room for, of which those behind the text are zeros.
        """
        parts = [part for layer in sources for part in (layer.keys, layer.values) if part is not None]
        apiece = len(parts)
        if targets[0].rooms is None:
            if room is None:
                apiece = max(1, _PIECE // (parts[0].nbytes // parts[0].shape[2] * tokens))
            rooms = rooms_like(parts, room or with_room(tokens), apiece)
            for layer, *of_layer in zip(targets, rooms[::2], rooms[1::2], strict=True):
                layer.rooms = layer._take(*of_layer)
        rooms = [part for layer in targets if layer.rooms is not None for part in layer.rooms]
        with torch.no_grad():
            for begin in range(0, len(parts), apiece):
                copy_tokens(parts[begin : begin + apiece], rooms[begin : begin + apiece], tokens, clears=room is None)

    def step_memory(self) -> Tensor | None:
        """Return the room of the keys, if it has a place for one more."""
        grown, rooms = self._grown, self.rooms
        if grown is None or rooms is None or self.keys is not grown[0] or self.values is not grown[1]:
            return None
        return rooms[0] if grown[0].shape[2] < rooms[0].shape[2] else None

    def write_at(self, place: Tensor | None) -> None:
        """Note that a step is recorded, whose token goes to `place`; or that none is."""
        self.place, self.newest, self._may_wait = place, None, False

    def note_tokens(self, tokens: int) -> None:
        """Take the number of tokens so far, of which recorded steps have written some."""
        assert self.keys is not None and self.rooms is not None
        of_queries, of_keys = self._query_room, self._key_room
        if self.key_codes is not None and self.key_codes.shape[2] == self.keys.shape[2]:
            assert of_queries is not None and of_keys is not None
            self.query_codes, self.key_codes = of_queries.narrow(2, 0, tokens), of_keys.narrow(2, 0, tokens)
        keys, values = self.rooms
        self.keys, self.values = self._grown = keys.narrow(2, 0, tokens), values.narrow(2, 0, tokens)

    def _update_recorded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return all there is room for; where attention is sparse, kernels of the step write the newest token there."""
        if key.shape[2] != 1 or self.rooms is None:
            raise RuntimeError(f"a recorded step has one token, and {key.shape[2]} came")
        may_wait, self._may_wait = self._may_wait, False
        self.newest = key, value
        if not may_wait:  # dense attention
            self.write_newest()
        return self.rooms

    def get_seq_length(self) -> int:
        if self.place is None:
            return super().get_seq_length()
        # A number would be the same in every replay.
        return (self.place if self.newest is None else self.place + 1)[0]  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.place is None or self.rooms is None:
            return super().get_mask_sizes(query_length)
        return self.rooms[0].shape[2], 0

    def check_mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        if self.place is None or self.rooms is None:
            return super().check_mask(attention_mask, length)
        return mask_of_keys(attention_mask, self.rooms[0].shape[2])

    def write_newest(self) -> None:
        """Write the key and the value of the last token, if that is still to be done."""
        if self.newest is None:
            return
        newest, self.newest = self.newest, None
        if self.place is not None and self.rooms is not None:
            for room, part in zip(self.rooms, newest, strict=True):
                room.index_copy_(2, self.place, part)
            return
        assert self.keys is not None and self.values is not None
        self.keys[:, :, -1:], self.values[:, :, -1:] = newest

    def append(self, query_codes: Tensor, key_codes: Tensor, owner: object) -> tuple[Tensor, Tensor]:
        """Keep the codes of the tokens whose keys `update` has just taken in.

        Args:
            query_codes, key_codes: `[B, Hq, n, c]` and `[B, Hkv, n, c]`.
            owner: identity of the predictor that made them.

        Returns:
            The codes of all tokens, `[B, Hq, T, c]` and `[B, Hkv, T, c]`; of all that there is room for while a step is
            recorded.

        Raises:
            ValueError: the codes that are here are another predictor's, or attention that needs no graph (dense or
                complete) took tokens in.
        """
        if self.place is not None:
            rooms = self.codes_to_write(owner)
            if rooms is None:
                raise RuntimeError("the codes of the cache have no room for a step that is to be recorded")
            for room, part in zip(rooms, (query_codes, key_codes), strict=True):
                room.index_copy_(2, self.place, part)
            return rooms
        before = 0 if self.key_codes is None else self.key_codes.shape[2]
        if before + key_codes.shape[2] != self.get_seq_length() or (before and self.owner != owner):
            raise ValueError(
                "the cache was filled by dense or complete attention or with another adapter, and the graph of its "
                "tokens is not known: start a new cache after switching adapters, and observe it from the start"
            )
        # There is as much room for codes as for keys.
        tokens = before + key_codes.shape[2] if self.rooms is None else self.rooms[0].shape[2]
        self.query_codes, self._query_room = extended(self.query_codes, self._query_room, query_codes, tokens)
        self.key_codes, self._key_room = extended(self.key_codes, self._key_room, key_codes, tokens)
        self.owner = owner
        return self.query_codes, self.key_codes

    def codes_to_write(self, owner: object) -> tuple[Tensor, Tensor] | None:
        """Return the codes of all tokens, of which those of the newest one are still to be written.

        While a step is recorded, these are the codes of all tokens that there is room for. `None` where `append` would
        refuse them, or the codes are not where the keys are.
        """
        of_queries, of_keys = self.query_codes, self.key_codes
        if of_queries is None or of_keys is None or self.keys is None or self.owner != owner:
            return None
        length = self.keys.shape[2]
        if self.place is not None:
            return self._codes_to_record(length)
        if (
            of_keys.shape[2] + 1 != length
            or of_keys.device != self.keys.device
            or of_keys.shape[0] != self.keys.shape[0]
        ):
            return None
        rooms = self._query_room, self._key_room
        tokens = length if self.rooms is None else self.rooms[0].shape[2]
        if any([room is None or room.shape[2] < tokens for room in rooms]) or not all(
            map(lies_in, (of_queries, of_keys), rooms)  # type: ignore[arg-type]
        ):
            rooms = self._query_room, self._key_room = room_behind(of_queries, tokens), room_behind(of_keys, tokens)
        self.query_codes, self.key_codes = (room.narrow(2, 0, length) for room in rooms if room is not None)
        return self.query_codes, self.key_codes

    def _codes_to_record(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Return the codes of all tokens that there is room for; `None` where they have no such room."""
        assert self.rooms is not None
        tokens, whole = self.rooms[0].shape[2], []
        for codes, room in ((self.query_codes, self._query_room), (self.key_codes, self._key_room)):
            if codes is None or room is None or codes.shape[2] != length or not lies_in(codes, room):
                return None
            if room.shape[2] < tokens:
                return None
            whole.append(room.narrow(2, 0, tokens))
        return whole[0], whole[1]

    def end_attention(self) -> None:
        """Move the codes where the keys are, if they were offloaded before the attention."""
        self.write_newest()
        if self.query_codes is not None and self.keys is not None:
            device = self.keys.device
            self._each(lambda codes: codes.to(device, non_blocking=True))

    def cancel_attention(self, length: int) -> None:
        self._may_wait = False
        if self.place is None:
            super().cancel_attention(length)

    def offload(self) -> None:
        self.write_newest()
        super().offload()
        self._each(lambda codes: codes.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self.write_newest()
        super().prefetch()
        self._each(lambda codes: codes.to(self.device, non_blocking=True))

    def reset(self) -> None:
        super().reset()
        self.newest = self.plan = self.rooms = self._grown = None
        self._query_room = self._key_room = None  # the next text may have other rows, and codes of another kind
        self.query_codes = self.key_codes = None
        self._may_wait = False

    def crop(self, tokens_to_remove: int) -> None:
        if not self.is_initialized:  # older transformers would crop what is not there
            return
        self.write_newest()
        super().crop(tokens_to_remove)
        self._each(lambda codes: codes[:, :, : self.get_seq_length()])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.write_newest()
        super().reorder_cache(beam_idx)
        self._each(lambda codes: codes.index_select(0, beam_idx.to(codes.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.write_newest()
        super().batch_repeat_interleave(repeats)
        self._each(lambda codes: codes.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.write_newest()
        super().batch_select_indices(indices)
        self._each(lambda codes: codes[indices.to(codes.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.query_codes is not None and self.key_codes is not None:
            self.query_codes, self.key_codes = change(self.query_codes), change(self.key_codes)
