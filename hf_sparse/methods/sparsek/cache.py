"""A fixed set of KV slots: sinks, selected keys and window in one buffer that never grows.

A slot remembers the score and the position of its key. What the key is follows from the position (sink, window or
selected), so slots need no order, and rows of different lengths share one buffer. A key that is evicted can never be
selected again (scores are frozen), so nothing that the model could still want is lost; an operation that would need
an evicted key raises.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class SparseKCacheLayer(CacheLayerMixin):
    """The KV slots of one layer, and the transformers cache layer that stands for it in a `Cache`.

    transformers calls `update` before the attention function; it only counts, because which keys to keep depends on
    scores that `SparseKAttention` computes. That calls `fill` or `insert` with everything.

    Attributes:
        keys, values: `[B, Hkv, S, D]` with `S = sinks + window + k`.
        scores: `[B, Hkv, S]` float32.
        positions: `[B, Hkv, S]` int64, index of the token in its row, -1 for an empty slot.
        seen: `[B]` int64, real tokens so far.
        owner: whose scores these are; scores of two scorers do not compare.
        announced: see `SparseMethod.cache_layer`.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, k: int, window: int, sinks: int, owner: object = None) -> None:
        super().__init__()
        self.k, self.window, self.sinks, self.owner = k, window, sinks, owner
        self.cumulative_length = 0
        self.announced = False
        self.scores: Tensor | None = None
        self.positions: Tensor | None = None
        self.seen: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.sinks + self.window + self.k

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys = key_states.new_zeros((batch, heads, self.slots, key_states.shape[-1]))
        self.values = value_states.new_zeros((batch, heads, self.slots, value_states.shape[-1]))
        self.scores = torch.zeros((batch, heads, self.slots), device=self.device)
        self.positions = torch.full((batch, heads, self.slots), -1, device=self.device)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.announced:
            raise RuntimeError(
                "this cache holds the KV slots of sparse attention, and the model continues it with dense attention: "
                "start a new cache after switching adapters on or off"
            )
        self.announced = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.scores = self.positions = self.seen = None
        self.is_initialized = False
        self.cumulative_length = 0

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for name in ("keys", "values", "scores", "positions", "seen"):
                setattr(self, name, change(getattr(self, name)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, as long as nothing has been evicted yet.

        Raises:
            ValueError: a positive count.
            RuntimeError: keys were evicted; the kept set of a shorter text may need them back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        assert self.positions is not None and self.seen is not None
        if int(self.seen.max()) > self.slots:
            raise RuntimeError(
                f"the SparseK cache has {self.slots} slots and has seen {int(self.seen.max())} tokens: keys were "
                "evicted for good, so it cannot be cropped (assisted decoding needs that; use a larger budget, or "
                "generate without an assistant)"
            )
        self.seen = (self.seen + tokens_to_remove).clamp(min=0)
        self.positions = self.positions.masked_fill(self.positions >= self.seen[:, None, None], -1)
        self.cumulative_length = max(0, self.cumulative_length + tokens_to_remove)

    # What the attention calls.

    def ordered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, scores and positions in the order of positions, empty slots first."""
        assert self.keys is not None and self.values is not None
        assert self.scores is not None and self.positions is not None
        positions, order = self.positions.sort(dim=-1)
        wide = order[..., None]
        return (
            self.keys.gather(2, wide.expand_as(self.keys)),
            self.values.gather(2, wide.expand_as(self.values)),
            self.scores.gather(2, order),
            positions,
        )

    @torch.no_grad()
    def fill(self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, seen: Tensor) -> None:
        """Keep what a query after all these tokens could still reach.

        Args:
            keys, values: `[B, Hkv, N, D]`, `N` of any size, in the order of positions.
            scores, positions: `[B, Hkv, N]`; a position of -1 marks an entry that is not a token.
            seen: `[B]`, real tokens so far.
        """
        assert self.keys is not None and self.values is not None
        kept = _best(scores, positions, seen, self.window, self.sinks, self.slots)
        count = kept.shape[-1]
        empty = positions.gather(2, kept) < 0
        for name, source in (("keys", keys), ("values", values)):
            getattr(self, name)[:, :, :count] = source.gather(2, kept[..., None].expand(-1, -1, -1, source.shape[-1]))
        self.scores = torch.nn.functional.pad(scores.gather(2, kept).float(), (0, self.slots - count))
        kept_positions = positions.gather(2, kept).masked_fill(empty, -1)
        self.positions = torch.nn.functional.pad(kept_positions, (0, self.slots - count), value=-1)
        self.seen = seen.clone()

    @torch.no_grad()
    def insert(self, key: Tensor, value: Tensor, score: Tensor, valid: Tensor | None) -> None:
        """Take the next token of each row into an empty slot, or into that of the weakest key outside the window.

        Args:
            key, value: `[B, Hkv, 1, D]`.
            score: `[B, Hkv, 1]`.
            valid: `[B]` bool, rows whose token is real; `None` if all are.
        """
        assert self.keys is not None and self.values is not None and self.seen is not None
        assert self.scores is not None and self.positions is not None
        position = self.seen[:, None, None]
        empty = self.positions < 0
        eligible = (self.positions >= self.sinks) & (self.positions <= position - self.window)
        old = self.scores.masked_fill(~eligible, torch.inf)
        weakest = eligible & (old == old.amin(-1, keepdim=True))
        # Of equal scores the lower index wins, so the later key leaves.
        victim = self.positions.masked_fill(~weakest, -1).argmax(-1, keepdim=True)
        slot = torch.where(empty.any(-1, keepdim=True), empty.int().argmax(-1, keepdim=True), victim)
        wide = slot[..., None].expand_as(key)
        if valid is not None:  # a padded row writes back what the slot holds
            real = valid[:, None, None]
            key = torch.where(real[..., None], key, self.keys.gather(2, wide))
            value = torch.where(real[..., None], value, self.values.gather(2, wide))
            score = torch.where(real, score, self.scores.gather(2, slot))
            position = torch.where(real, position, self.positions.gather(2, slot))
        self.keys.scatter_(2, wide, key)
        self.values.scatter_(2, wide, value)
        self.scores.scatter_(2, slot, score.float())
        self.positions.scatter_(2, slot, position.expand_as(slot))
        self.seen += 1 if valid is None else valid.long()


def _best(scores: Tensor, positions: Tensor, seen: Tensor, window: int, sinks: int, slots: int) -> Tensor:
    """Indices `[B, Hkv, min(N, slots)]` of the entries to keep, in the order of positions."""
    near = (positions >= seen[:, None, None] - window) | (positions < sinks)
    priority = scores.masked_fill(near, torch.inf).masked_fill(positions < 0, -torch.inf)
    order = priority.argsort(dim=-1, descending=True, stable=True)[..., :slots]
    return order.sort(dim=-1).values
