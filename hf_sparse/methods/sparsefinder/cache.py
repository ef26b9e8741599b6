"""Keep the codes that the graph is predicted from, beside all keys and values.

A code (clusters, bins or the projected point) is a function of its token alone, so a token keeps it for as long as it
stays. Queries keep theirs too: those of a few tokens describe the tile of queries that comes next.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.in_place import InPlaceCacheLayer
from hf_sparse.methods.sparsefinder.rooms import extended, lies_in, room_behind


class SparsefinderCacheLayer(InPlaceCacheLayer):
    """Keep the codes of all tokens beside their keys and values.

    Attributes:
        query_codes, key_codes: `[B, Hq, T, c]` and `[B, Hkv, T, c]`, int64 or float32; `None` before the first, and
            for a predictor without codes.
        owner: whose codes these are; those of two predictors do not compare.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query_codes: Tensor | None = None
        self.key_codes: Tensor | None = None
        self.owner: object = None
        self._query_room: Tensor | None = None
        self._key_room: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_query_room": None, "_key_room": None}

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

    def note_tokens(self, tokens: int) -> None:
        assert self.keys is not None
        of_queries, of_keys = self._query_room, self._key_room
        if self.key_codes is not None and self.key_codes.shape[2] == self.keys.shape[2]:
            assert of_queries is not None and of_keys is not None
            self.query_codes, self.key_codes = of_queries.narrow(2, 0, tokens), of_keys.narrow(2, 0, tokens)
        super().note_tokens(tokens)

    def end_attention(self) -> None:
        """Move the codes where the keys are, if they were offloaded before the attention."""
        super().end_attention()
        if self.query_codes is not None and self.keys is not None:
            device = self.keys.device
            self._each(lambda codes: codes.to(device, non_blocking=True))

    def offload(self) -> None:
        super().offload()
        self._each(lambda codes: codes.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._each(lambda codes: codes.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._each(lambda codes: codes[:, :, : self.get_seq_length()])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda codes: codes.index_select(0, beam_idx.to(codes.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda codes: codes.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda codes: codes[indices.to(codes.device)])

    def reset(self) -> None:
        super().reset()
        self._query_room = self._key_room = None  # the next text may have other rows, and codes of another kind
        self.query_codes = self.key_codes = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.query_codes is not None and self.key_codes is not None:
            self.query_codes, self.key_codes = change(self.query_codes), change(self.key_codes)
