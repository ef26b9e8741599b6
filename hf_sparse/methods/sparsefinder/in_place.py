"""Keep all keys and values, as an ordinary cache, in tensors with room for more tokens.

Where nothing is learned, a text grows token by token there, so that a step copies no key of the tokens before it. A
step whose kernels write the newest key and value themselves finds them in `newest`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.core.cache import GrowingCacheLayer, mask_of_keys
from hf_sparse.methods.sparsefinder.rooms import copy_tokens, lies_in, room_behind, rooms_like, with_room
from hf_sparse.ops.triton import available

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.step import ClusterPlan, ExactPlan

_PIECE = 1 << 26  # bytes of several layers that lie, and later go, together after a recorded prompt


class InPlaceCacheLayer(GrowingCacheLayer):
    """Let keys and values grow in place, also in steps that are recorded.

    Attributes:
        keys, values: `[B, Hkv, T, D]`.
        newest: key and value `[B, Hkv, 1, D]` of the last token, where they are still to be written to `keys` and
            `values`; see `write_newest`.
        rooms: what `keys` and `values` lie in, with room for more tokens; `None` where they lie in nothing larger.
        place: `[1]` int64, where the newest token goes while a step is recorded; `None` otherwise.
        is_dense: whether attention was dense when the last tokens came: of a recorded step, only a mask then tells it
            which keys are to come.
        plan: what the steps of this layer have in common, see `hf_sparse.methods.sparsefinder.step`.
        checked: layout of the query of the last step that kernels took.
    """

    is_dense = False

    def __init__(self) -> None:
        super().__init__()
        self.newest: tuple[Tensor, Tensor] | None = None
        self.rooms: tuple[Tensor, Tensor] | None = None
        self.place: Tensor | None = None
        self.plan: ExactPlan | ClusterPlan | None = None
        self.checked: tuple[Any, ...] | None = None
        self._may_wait = False
        self._grown: tuple[Tensor, Tensor] | None = None  # what the last step returned
        self._kind: tuple[Any, ...] | None = None  # of its token

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what only this layer may write to, and what it can make again."""
        self.write_newest()
        names = ("plan", "rooms", "_grown")
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

    def end_attention(self) -> None:
        """Write the newest token, if no kernel did."""
        self.write_newest()

    def cancel_attention(self, length: int) -> None:
        self._may_wait = False
        if self.place is None:
            super().cancel_attention(length)

    # What recorded prompts and recorded steps ask for, see `RecordableCacheLayer`.

    @staticmethod
    def copy_texts(
        sources: Sequence["InPlaceCacheLayer"],
        targets: Sequence["InPlaceCacheLayer"],
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
        assert self.rooms is not None
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

    # What transformers does with the tokens of a cache.

    def offload(self) -> None:
        self.write_newest()
        super().offload()

    def prefetch(self) -> None:
        self.write_newest()
        super().prefetch()

    def crop(self, tokens_to_remove: int) -> None:
        if not self.is_initialized:  # older transformers would crop what is not there
            return
        self.write_newest()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.write_newest()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.write_newest()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.write_newest()
        super().batch_select_indices(indices)

    def reset(self) -> None:
        super().reset()
        self.newest = self.plan = self.rooms = self._grown = None
        self._may_wait = False
