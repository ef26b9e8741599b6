"""Configuration of SparseK attention."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_sparse._compat import extend_peft_type
from hf_sparse.core.checks import (
    MOST_TOKENS,
    MOST_WIDTH,
    expected_integer,
    expected_number,
    is_finite,
    is_integer,
)
from hf_sparse.core.config import BASE_SHAPE, LAYERS, TARGET_MODULES, SparseConfig
from hf_sparse.methods.sparsek.budget import Budget

# PEFT's error for a type it does not know is nothing but this name, so the name says what to import.
PEFT_TYPE = "HF_SPARSE_SPARSEK"


@dataclass
class SparseKConfig(SparseConfig):
    """Configure SparseK: every query attends to `sinks + window + k` keys, and the KV cache has as many slots.

    Lou et al. 2024 (arXiv 2406.16747), with sinks, and with soft gates inside the softmax while training (ours). In an
    encoder, which is no part of the paper, the window reaches to both sides and one selection serves all queries.

    >>> SparseKConfig(k=188, window=64, sinks=4).slots
    256
    """

    k: int = field(
        default=188,
        metadata={
            "help": "Older keys kept per KV head: the k best-scored; in an encoder, of the whole text. At least 1."
        },
    )
    window: int = field(
        default=64,
        metadata={"help": "Most recent keys, always attended; in an encoder, the nearest on both sides. At least 1."},
    )
    sinks: int = field(
        default=4, metadata={"help": "First keys of a sequence, such as [CLS], always attended. At least 0."}
    )
    scorer: Literal["linear", "mlp"] = field(
        default="linear",
        metadata={"help": "'linear': one weight per input feature and KV head. 'mlp': one hidden layer."},
    )
    scorer_hidden_size: int = field(default=128, metadata={"help": "Width of the hidden layer of the 'mlp' scorer."})
    position_slope: float = field(
        default=0.0,
        metadata={
            "help": "Added to a score per token of absolute position; positive values favour recent (later) keys."
        },
    )
    learn_slope: bool = field(
        default=True,
        metadata={
            "help": "Every KV head learns a slope of its own, beginning at position_slope. Not in an encoder, where no "
            "key is older than another."
        },
    )
    layer_shares: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of the budget for each attention layer of the model, 1 on average: layer n has about "
            "layer_shares[n] * k selected keys and layer_shares[n] * window recent ones. None is 1 for all."
        },
    )
    support: int | None = field(
        default=4,
        metadata={
            "help": "While training, soft gates spread over the best support * k keys at most, which keeps the cost "
            "linear while score scales are small. None is exact SparseK."
        },
    )
    layers: list[int] | None = field(default=None, metadata=LAYERS)
    target_modules: list[str] | str | None = field(default=None, metadata=TARGET_MODULES)
    base_shape: dict[str, Any] | None = field(default=None, metadata=BASE_SHAPE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type(PEFT_TYPE)
        self._check_integers(
            k=(1, MOST_TOKENS), window=(1, MOST_TOKENS), sinks=(0, MOST_TOKENS), scorer_hidden_size=(1, MOST_WIDTH)
        )
        if self.support is not None and not is_integer(self.support, 1):
            raise ValueError(self._expected("support", f"None or {expected_integer(self.support, 1)}"))
        if self.scorer not in ("linear", "mlp"):
            raise ValueError(self._expected("scorer", "'linear' or 'mlp'"))
        if not is_finite(self.position_slope):
            raise ValueError(self._expected("position_slope", expected_number(self.position_slope, "a finite number")))
        self._check_switches("learn_slope")
        if self.layer_shares is not None:
            shares = self.layer_shares
            if not isinstance(shares, Sequence) or not shares or not all(is_finite(s) and s > 0 for s in shares):
                raise ValueError(self._expected("layer_shares", "None or positive numbers"))
            if abs(sum(shares) / len(shares) - 1) > 1e-3:
                raise ValueError(
                    f"SparseKConfig.layer_shares must be 1 on average, so that the budget is that of all layers; the "
                    f"mean is {sum(shares) / len(shares):.4f}"
                )

    @property
    def slots(self) -> int:
        """Return the KV pairs per layer and KV head, `sinks + window + k`; the mean where `layer_shares` differ."""
        return self.sinks + self.window + self.k

    def budget(self, layer: int) -> Budget:
        """Return what the KV heads of one attention layer have; the sum over all layers is that of equal shares.

        Args:
            layer: index among the attention layers of the model.
        """
        if self.layer_shares is None:
            return Budget(self.k, self.window, self.sinks)
        before = sum(self.layer_shares[:layer])
        after = before + self.layer_shares[layer]

        def share(total: int) -> int:
            return max(1, round(total * after) - round(total * before))

        return Budget(share(self.k), share(self.window), self.sinks)

    def soft_support(self, k: int) -> int | None:
        """Return over how many keys the soft gates of `k` selected ones may spread, `None` without bound."""
        return None if self.support is None else self.support * k
