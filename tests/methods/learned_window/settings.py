"""Describe the method without torch: the settings of an adapter and of its training, whose fields become options."""

from dataclasses import dataclass, field
from typing import Any

from hf_sparse.core.adapter_settings import BASE_SHAPE, LAYERS, TARGET_MODULES, AdapterSettings
from hf_sparse.core.checks import MOST_TOKENS
from hf_sparse.core.method_settings import MethodSettings
from hf_sparse.core.settings import TrainingSettings, check_number


@dataclass
class WindowSettings(AdapterSettings):
    """Hold the settings of an adapter, which end with the three that every method has."""

    first_width: int = field(default=64, metadata={"help": "Width of every window before training. At least 1."})
    layers: list[int] | None = field(default=None, metadata=LAYERS)
    target_modules: list[str] | str | None = field(default=None, metadata=TARGET_MODULES)
    base_shape: dict[str, Any] | None = field(default=None, metadata=BASE_SHAPE)

    def check_settings(self) -> None:
        super().check_settings()
        self._check_integers(first_width=(1, MOST_TOKENS))

    def attended(self) -> str:
        return f"windows of {self.first_width} keys before training"


@dataclass(frozen=True)
class WindowTrainingSettings(TrainingSettings):
    """Hold the training settings that only this method has."""

    width_price: float = field(
        default=0.1, metadata={"help": "Added to the loss for windows as wide as the text, and for narrower ones less."}
    )

    def __post_init__(self) -> None:
        check_number("width_price", self.width_price, most=1e6, or_zero=True)


SETTINGS = MethodSettings(
    name="window",
    label="Learned window",
    summary="a sliding window per head, as wide as it learned to be",
    peft_type="HF_SPARSE_LEARNED_WINDOW",
    adapter=WindowSettings,
    training=WindowTrainingSettings,
)
