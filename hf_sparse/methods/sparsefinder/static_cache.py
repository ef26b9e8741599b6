"""Keep keys, values and codes in tensors of fixed size, so that a decoding step can be compiled and recorded.

A step gets the whole tensors; what lies behind the newest token is its future. Whatever brings several tokens, such as
a prompt, is cut to the tokens that there are.
"""

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from hf_sparse.core.cache import ModelCall, is_recorded, mask_of_keys


class StaticSparsefinderCacheLayer(StaticLayer):
    """Keep keys, values and codes as the layer of a `StaticCache` does.

    Attributes:
        keys, values: `[B, Hkv, S, D]`, of which the first `cumulative_length` are tokens.
        query_codes, key_codes: `[B, Hq, S, c]` and `[B, Hkv, S, c]`, int64 or float32; `None` before the first, and
            where all keys are attended to.
        owner: whose codes these are.
        in_attention: whether the patch announced sparse attention that is not done yet.
    """

    call: ModelCall | None = None

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.query_codes: Tensor | None = None
        self.key_codes: Tensor | None = None
        self.owner: object = None
        self.in_attention = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.in_attention:
            raise RuntimeError(
                "this static cache belongs to sparse attention, and the model continues it with dense attention: "
                "start a new cache after switching adapters on or off"
            )
        keys, values = super().update(key_states, value_states)
        return self._cut(keys, key_states.shape[2]), self._cut(values, key_states.shape[2])

    def append(self, query_codes: Tensor, key_codes: Tensor, owner: object) -> tuple[Tensor, Tensor]:
        """Keep the codes of the tokens whose keys `update` has just taken in.

        Args:
            query_codes, key_codes: `[B, Hq, n, c]` and `[B, Hkv, n, c]`.
            owner: identity of the predictor that made them.

        Returns:
            The codes of all tokens, for a single token those of the whole tensors.

        Raises:
            ValueError: the codes that are here are another predictor's.
        """
        new = key_codes.shape[2]
        if self.query_codes is None or self.key_codes is None:
            self.query_codes, self.key_codes = self._room_for(query_codes), self._room_for(key_codes)
            self.owner = owner
        if self.owner != owner:
            raise ValueError(
                "the cache was filled with another adapter, and the graph of its tokens is not known: start a new "
                "cache after switching adapters"
            )
        position = torch.arange(-new, 0, device=self.device) + self.cumulative_length
        self.query_codes.index_copy_(2, position, query_codes)
        self.key_codes.index_copy_(2, position, key_codes)
        return self._cut(self.query_codes, new), self._cut(self.key_codes, new)

    def _room_for(self, codes: Tensor) -> Tensor:
        room = torch.zeros(
            (*codes.shape[:2], self.max_cache_len, codes.shape[3]), dtype=codes.dtype, device=self.device
        )
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(room)
        return room

    def _cut(self, tensor: Tensor, new: int) -> Tensor:
        return tensor if new == 1 else tensor[:, :, : int(self.cumulative_length)]

    @property
    def place(self) -> Tensor:
        """Return where the newest token is, `[1]` int64."""
        return (self.cumulative_length - 1).view(1)

    def begin_attention(self) -> None:
        """Note that sparse attention follows the next `update`."""
        self.in_attention = True

    def check_mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Return the padding mask of the keys that `update` returned, see `SparseCacheLayer`."""
        return mask_of_keys(attention_mask, self.max_cache_len if length == 1 else int(self.cumulative_length))

    def end_attention(self) -> None:
        """Note that the attention is done."""
        self.in_attention = False

    def cancel_attention(self, length: int) -> None:
        """Forget the newest tokens, see `SparseCacheLayer`; the next ones are written over them."""
        self.in_attention = False
        if not is_recorded(self.device):
            self.cumulative_length.sub_(length)  # its `crop`, which older transformers lack

    def refusal_of_static(self) -> str | None:
        """Say nothing: it stands in a static cache."""
        return None

    def share_mask_sizes(self) -> None:
        """Change nothing: the mask has a column for every key that there is room for."""

    def reset(self) -> None:
        """Forget all tokens, and keep the tensors."""
        super().reset()
        self.owner = self.query_codes = self.key_codes = None
        self.in_attention = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for tensor in (self.keys, self.values, self.query_codes, self.key_codes):
            if tensor is not None:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
