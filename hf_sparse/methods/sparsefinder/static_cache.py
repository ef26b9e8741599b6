"""Keep keys and values in tensors of fixed size, so that a decoding step over all keys compiles and is captured.

A step gets the whole tensors; what lies behind the newest token is its future. Whatever brings several tokens, such as
a prompt, is cut to the tokens that there are.
"""

from torch import Tensor
from transformers.cache_utils import StaticLayer

from hf_sparse.core.cache import mask_of_keys


class StaticSparsefinderCacheLayer(StaticLayer):
    """Hold the keys and values of a `StaticCache` for attention that needs no codes.

    Attributes:
        keys, values: `[B, Hkv, S, D]`, of which the first `cumulative_length` are tokens.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)
        if key_states.shape[2] == 1:
            return self.keys, self.values
        length = int(self.cumulative_length)
        return self.keys[:, :, :length], self.values[:, :, :length]

    @property
    def newest(self) -> Tensor:
        """Return the position of the newest token, `[1]` int64."""
        return (self.cumulative_length - 1).view(1)

    def begin_attention(self) -> None:
        """Do nothing: dense attention would find all keys too."""

    def check_mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Return the padding mask of the keys that `update` returned, see `SparseCacheLayer`."""
        if length == 1:
            return mask_of_keys(attention_mask, self.max_cache_len)
        return mask_of_keys(attention_mask, int(self.cumulative_length))

    def end_attention(self) -> None:
        """Do nothing: there is nothing to finish."""

    def refusal_of_static(self) -> str | None:
        """Say nothing: it stands in a static cache."""
        return None

    def share_mask_sizes(self) -> None:
        """Change nothing: the mask has a column for every key that there is room for."""

    def reset(self) -> None:
        """Forget all tokens, and keep the tensors."""
        if self.is_initialized:
            self.cumulative_length.zero_()
            self.keys.zero_()
            self.values.zero_()
