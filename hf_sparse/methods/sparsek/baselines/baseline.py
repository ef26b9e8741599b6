"""Define the interface of baselines, and the input that they may use."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from hf_sparse.methods.sparsek.budget import Budget

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.cache import SparseKCacheLayer


@dataclass
class Arrivals:
    """Hold the new tokens of one attention module.

    Attributes:
        query: `[B, Hq, T, D]`; key: `[B, Hkv, T, D]`, positions applied.
        index: `[B, T]` int64, of each token among the real tokens of its row.
        valid: `[B, T]` bool, False for padding; `None` if every token is real.
        scaling: multiplies the logits.
        places: sinks and selected keys of a KV head, of the one that has the fewest.
        window: most recent keys that are always attended.
        layer: index of the layer in the model.
        cache: the slots that these tokens go into, `None` for whole texts without a cache.
    """

    query: Tensor
    key: Tensor
    index: Tensor
    valid: Tensor | None
    scaling: float
    places: int
    window: int
    layer: int
    cache: "SparseKCacheLayer | None"


class Baseline:
    """Map new tokens to their scores, of which the highest keep their places.

    Baselines hold no state of a text: that is in the cache. Those that are equal may share a cache.

    Attributes:
        block: `None` if scores are frozen on arrival; otherwise how many tokens an adaptive baseline takes at a time.
        bidirectional: whether it can choose in an encoder.
        depends_on_text: whether a score depends on other tokens of the text, so that removing tokens cannot undo it.
    """

    block: int | None = None
    bidirectional: ClassVar[bool] = False
    depends_on_text: ClassVar[bool] = False

    def __call__(self, new: Arrivals) -> Tensor:
        """Return the scores `[B, Hkv, T]` float32 of new tokens; what stands at padding is meaningless."""
        raise NotImplementedError

    def budget(self, budget: Budget, causal: bool) -> Budget:
        """Say how the attention spends the budget of a layer."""
        return budget
