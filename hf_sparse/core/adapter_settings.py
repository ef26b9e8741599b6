"""Hold the settings of an adapter that every method has, and check them.

Nothing here imports torch: the command line makes its options of the fields of settings, and checks values by them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_sparse.core.checks import (
    MOST_WIDTH,
    expected_integer,
    expected_number,
    indices,
    is_finite,
    is_integer,
    shown,
)

#: The fields that the settings of every method declare as their last ones.
LAST_FIELDS = ("layers", "target_modules", "base_shape")

#: The metadata of these fields.
LAYERS = {"help": "Indices of the layers to patch; all of them by default.", "metavar": "0,1,..."}
TARGET_MODULES = {"help": "Filled in when attached: names of the patched attention modules.", "cli": False}
BASE_SHAPE = {"help": "Filled in when attached: what the base model must look like.", "cli": False}


@dataclass
class AdapterSettings:
    """Hold the settings of one adapter that have nothing to do with PEFT. Each method has a subclass with its own.

    A subclass ends with the three fields of `LAST_FIELDS`, as `SparseKSettings` does. As dataclass fields of this class
    they would come before those of the method, and the order of the fields is part of what adapters promise.

    The configuration of the method inherits from both, first this one: `class SparseKConfig(SparseKSettings,
    SparseConfig)`.

    The `metadata` of a field has `"help"`, a sentence; `"cli": False` where the command line has no option for it;
    `"metavar"`, what stands for the value in `--help`; `"option"`, the option's name where it is not that of the field;
    `"none_as"`, the value that stands for `None` on the command line.

    Attributes:
        config_name: the name of the configuration in messages.
    """

    config_name: ClassVar[str] = ""

    if TYPE_CHECKING:
        layers: list[int] | None = None
        target_modules: list[str] | str | None = None
        base_shape: dict[str, Any] | None = None

    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules of the base model that are trained and saved with the adapter, such as its head. With the "
            "task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS the head is among them, and need not be named.",
            "cli": False,
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of a learned change of the linear layers (queries, keys, values, output) of every patched "
            "attention module; 0 is none."
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "The change is multiplied by this over lora_rank; by default it is twice the rank."},
    )
    saves_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Filled in when saved: the file also holds the embeddings of the base model, which are not those "
            "of its checkpoint.",
            "cli": False,
        },
    )

    def __post_init__(self) -> None:
        self.check_settings()

    def check_settings(self) -> None:
        """Raise `ValueError` for a setting out of its range; a subclass checks its own after these."""
        rank, alpha = self.lora_rank, self.lora_alpha
        if not is_integer(rank, 0, MOST_WIDTH):
            raise ValueError(self._expected("lora_rank", expected_integer(rank, 0, MOST_WIDTH)))
        if alpha is not None and not (is_finite(alpha) and alpha > 0):
            raise ValueError(self._expected("lora_alpha", expected_number(alpha, "None or a number above 0")))
        if self.layers is not None:
            layers = indices(self.layers)
            if layers is None:
                raise ValueError(self._expected("layers", "None or a list of indices of layers"))
            self.layers = layers

    def attended(self) -> str:
        """Return a few words on what a query attends to, for people who made an adapter with these settings."""
        return "sparse attention"

    def _expected(self, name: str, what: str) -> str:
        """Say what was expected of a field, and what it holds."""
        owner = self.config_name or type(self).__name__
        return f"{owner}.{name} must be {what}, got {shown(getattr(self, name))}"

    def _check_integers(self, **bounds: tuple[int, int]) -> None:
        """Raise `ValueError` for a field that is no integer between its two bounds, both included."""
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not is_integer(value, least, most):
                raise ValueError(self._expected(name, expected_integer(value, least, most)))

    def _check_switches(self, *names: str) -> None:
        """Raise `ValueError` for a field that is neither True nor False."""
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(self._expected(name, "True or False"))
