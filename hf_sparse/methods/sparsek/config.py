"""Configure SparseK attention."""

from dataclasses import dataclass
from typing import cast

import torch

from hf_sparse._compat import extend_peft_type
from hf_sparse.core.config import SparseConfig
from hf_sparse.methods.sparsek.budget import Budget, Counts, HeadShares
from hf_sparse.methods.sparsek.settings import PEFT_TYPE, SparseKSettings
from hf_sparse.ops.selection.thresholds import MOST_LISTED


@dataclass
class SparseKConfig(SparseKSettings, SparseConfig):
    """Configure SparseK: every query attends to `sinks + window + k` keys, and the KV cache has as many slots.

    Lou et al. 2024 (arXiv 2406.16747), with sinks, and with soft gates inside the softmax while training (ours). In an
    encoder, which is no part of the paper, the window reaches to both sides and one selection serves all queries.

    >>> SparseKConfig(k=188, window=64, sinks=4).slots
    256
    """

    # No fields: `HeadShares` once they were asked for; what budgets depend on, and those of layers.
    _divided = cast("HeadShares | None", None)
    _budgets = cast("tuple[object, dict[int, Budget]]", (None, {}))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type(PEFT_TYPE)
        for layer in range(len(self.layer_shares or self.head_shares or [1.0])):
            self.budget(layer)

    @property
    def slots(self) -> int:
        """Return the KV pairs per layer and KV head, `sinks + window + k`; the mean where shares differ."""
        return self.sinks + self.window + self.k

    def budget(self, layer: int) -> Budget:
        """Return what the KV heads of one attention layer have; the sum over all layers is that of equal shares.

        The first tokens of a text that are pinned are sinks here, in places of selected keys.

        Args:
            layer: index among the attention layers of the model.

        Raises:
            ValueError: the pinned tokens leave a head no selected key.
        """
        if torch.compiler.is_compiling() or not self.is_attached:
            return self._budget(layer)
        # Every layer asks in every forward. `override` may change a configuration that is attached.
        given = self.k, self.window, self.sinks, self.pin_prompt, self.layer_shares, self.head_shares
        of_given, budgets = self._budgets
        if of_given != given:
            budgets = {}
            self._budgets = given, budgets  # together, for threads
        budget = budgets.get(layer)
        if budget is None:
            budget = budgets[layer] = self._budget(layer)
        return budget

    def _budget(self, layer: int) -> Budget:
        """Return what `budget` returns, worked out anew."""
        budget = self._without_pins(layer)
        return budget if self.pin_prompt <= budget.sinks else budget.pinned(self.pin_prompt)

    def _without_pins(self, layer: int) -> Budget:
        """Return the budget of a layer with the sinks of the configuration."""
        if self.head_shares is not None:
            if self._divided is None or self._divided.shares is not self.head_shares:
                self._divided = HeadShares(self.head_shares)
            counts = self._divided.of_layer(layer, self.k)
            return Budget(counts[0] if len(set(counts)) == 1 else counts, self.window, self.sinks)
        if self.layer_shares is None:
            return Budget(self.k, self.window, self.sinks)
        before = sum(self.layer_shares[:layer])
        after = before + self.layer_shares[layer]

        def share(total: int) -> int:
            return max(1, round(total * after) - round(total * before))

        return Budget(share(self.k), share(self.window), self.sinks)

    def soft_support(self, k: Counts) -> Counts | None:
        """Return over how many keys the soft gates of `k` selected ones may spread, `None` without bound."""
        if self.support is None:
            return None
        if isinstance(k, int):
            return _bound(self.support, k)
        return tuple([_bound(self.support, count) for count in k])


def _bound(support: int, k: int) -> int:
    """Return over how many keys gates may spread: no more than kernels list, unless `k` are as many.

    Over `k` alone all gates would be 1, and no score had a gradient.
    """
    return min(support * k, max(MOST_LISTED, k + k // 64))
