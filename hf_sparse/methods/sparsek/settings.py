"""Describe SparseK and define the settings of its adapters. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_sparse.core.adapter_settings import BASE_SHAPE, LAYERS, TARGET_MODULES, AdapterSettings
from hf_sparse.core.checks import MOST_TOKENS, MOST_WIDTH, expected_integer, expected_number, is_finite, is_integer
from hf_sparse.core.method_settings import MethodSettings
from hf_sparse.methods.sparsek.budget import ROUNDING
from hf_sparse.methods.sparsek.evaluation_settings import SparseKEvaluationSettings
from hf_sparse.methods.sparsek.training_settings import SparseKTrainingSettings

# PEFT's error for a type it does not know is nothing but this name, so the name says what to import.
PEFT_TYPE = "HF_SPARSE_SPARSEK"

#: The value of `pin_prompt` that stands for all tokens of a prompt.
WHOLE_PROMPT = -1


@dataclass
class SparseKSettings(AdapterSettings):
    """Hold the settings of a SparseK adapter; `SparseKConfig` is the configuration that has them."""

    config_name: ClassVar[str] = "SparseKConfig"

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
            "linear while score scales are small, and over about 8,192 at most if k is less. None is exact SparseK.",
            "none_as": 0,
        },
    )
    head_shares: list[list[float]] | None = field(
        default=None,
        metadata={
            "help": "For each attention layer of the model, the share of k for each of its KV heads, 1 on average over "
            "all: head h of layer n has about head_shares[n][h] * k selected keys. Window and sinks are those of all "
            "heads. None is 1 for all.",
            "cli": False,
        },
    )
    pin_prompt: int = field(
        default=0,
        metadata={
            "help": "First tokens of a text that are always kept, in places of selected keys. -1 stands for the "
            "whole prompt: the first input to a KV cache."
        },
    )
    slope_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens after which slopes grow by the logarithm of the position, so that a key from the beginning "
            "of a long text is behind by little more than in a short one. 0: always by the position itself. None: the "
            "same, and `finetune` sets 1,024 in an adapter that has learned no slope yet, if k is 128 or more and "
            "position_slope 0."
        },
    )
    layers: list[int] | None = field(default=None, metadata=LAYERS)
    target_modules: list[str] | str | None = field(default=None, metadata=TARGET_MODULES)
    base_shape: dict[str, Any] | None = field(default=None, metadata=BASE_SHAPE)

    def check_settings(self) -> None:
        super().check_settings()
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
        if self.slope_length is not None and not is_integer(self.slope_length, 0):
            raise ValueError(self._expected("slope_length", f"None or {expected_integer(self.slope_length, 0)}"))
        if self.layer_shares is not None:
            shares = self.layer_shares
            if not isinstance(shares, Sequence) or not shares or not all(is_finite(s) and s > 0 for s in shares):
                raise ValueError(self._expected("layer_shares", "None or positive numbers"))
            if abs(sum(shares) / len(shares) - 1) > ROUNDING:
                raise ValueError(
                    f"SparseKConfig.layer_shares must be 1 on average, so that the budget is that of all layers; the "
                    f"mean is {sum(shares) / len(shares):.4f}"
                )
        if not is_integer(self.pin_prompt, -1):
            raise ValueError(self._expected("pin_prompt", f"{WHOLE_PROMPT} or {expected_integer(self.pin_prompt, 0)}"))
        if self.pin_prompt >= self.k + self.sinks:
            raise ValueError(
                f"SparseKConfig.pin_prompt is {self.pin_prompt}, and the budget has {self.k} selected keys and "
                f"{self.sinks} sinks: at least one selected key must be left, so pin at most {self.k + self.sinks - 1}"
            )
        if self.head_shares is not None:
            self._check_head_shares(self.head_shares)

    def _check_head_shares(self, rows: Any) -> None:
        """Raise `ValueError` unless every KV head has a share that is at least one key, and the mean of all is 1."""
        if not _is_list(rows) or not all(_is_list(row) and all(is_finite(s) and s > 0 for s in row) for row in rows):
            raise ValueError(self._expected("head_shares", "None or a list of positive numbers for each layer"))
        if self.layer_shares is not None:
            raise ValueError(
                "SparseKConfig.head_shares divides k among the heads of all layers, and layer_shares among the layers: "
                "give one of the two"
            )
        shares = [share for row in rows for share in row]
        mean = sum(shares) / len(shares)
        if abs(mean - 1) > ROUNDING:
            raise ValueError(
                "SparseKConfig.head_shares must be 1 on average over all heads, so that the budget is that of equal "
                f"shares; the mean is {mean:.4f}"
            )
        if min(shares) * self.k / mean < 1 - 1e-9:
            raise ValueError(
                f"SparseKConfig.head_shares must leave every head a selected key: k is {self.k}, so the smallest share "
                f"must be at least {mean / self.k:.4f}, got {min(shares)}"
            )

    def attended(self) -> str:
        slots = self.sinks + self.window + self.k
        means = "" if self.layer_shares is None and self.head_shares is None else " on average"
        return f"{slots} keys per query and KV head{means}: {self.sinks} sinks, window {self.window}, {self.k} selected"


def _is_list(value: Any) -> bool:
    """Tell whether a value is a sequence with something in it, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0


SETTINGS = MethodSettings(
    name="sparsek",
    label="SparseK",
    summary="a fixed number of keys",
    peft_type=PEFT_TYPE,
    adapter=SparseKSettings,
    training=SparseKTrainingSettings,
    evaluation=SparseKEvaluationSettings,
)
