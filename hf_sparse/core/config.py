"""Hold what the configurations of all methods have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, TaskType

from hf_sparse.core.checks import (
    MOST_WIDTH,
    expected_integer,
    expected_number,
    indices,
    is_finite,
    is_integer,
    shown,
)

#: PEFT's task types whose classes add names to `modules_to_save`.
TASKS_WITH_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})

#: Fields that PEFT or this package fills in for an adapter that is attached already.
FILLED_IN = frozenset(
    {*(f.name for f in fields(PeftConfig)), "modules_to_save", "saves_embeddings", "target_modules", "base_shape"}
)

#: The fields that the configuration of every method declares as its last ones.
LAST_FIELDS = ("layers", "target_modules", "base_shape")

#: What `--help` and the documentation say of these fields.
LAYERS = {"help": "Indices of the layers to patch; None is all of them."}
TARGET_MODULES = {"help": "Filled in when attached: names of the patched attention modules."}
BASE_SHAPE = {"help": "Filled in when attached: what the base model must look like."}


@dataclass
class SparseConfig(PeftConfig):
    """Hold the settings of one adapter. Each method has a subclass with fields of its own.

    A subclass ends with the three fields of `LAST_FIELDS`, as `SparseKConfig` does. As dataclass fields of this class
    they would come before those of the method, and the order of the fields is part of what adapters promise.

    Once it is attached to a model, the fields of the method are read-only: what was built from them would not follow.

    Attributes:
        named_modules_to_save: the names that the configuration was made with. PEFT's classes for task types add theirs
            to `modules_to_save` before any model sees it, those of an adapter that was saved without a head too.
    """

    if TYPE_CHECKING:
        layers: list[int] | None = None
        target_modules: list[str] | str | None = None
        base_shape: dict[str, Any] | None = None

    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules of the base model that are trained and saved with the adapter, such as its head. With the "
            "task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS the head is among them, and need not be named."
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
        default=None, metadata={"help": "The change is multiplied by lora_alpha / lora_rank. None is twice the rank."}
    )
    saves_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Filled in when saved: the file also holds the embeddings of the base model, which are not those "
            "of its checkpoint."
        },
    )

    def __post_init__(self) -> None:
        self._check_peft_fields()
        super().__post_init__()
        self._check_modules_to_save()
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

    def __setattr__(self, name: str, value: Any) -> None:
        if self.is_attached and name in self.__dataclass_fields__ and name not in FILLED_IN:
            raise AttributeError(
                f"{type(self).__name__}.{name} is read-only: the configuration is attached to a model, which was built "
                f"from it. Add a new adapter with dataclasses.replace(config, {name}=...), or change it for the length "
                f"of a block: with hf_sparse.core.overrides.override([config], {name}=...)"
            )
        super().__setattr__(name, value)

    @property
    def is_attached(self) -> bool:
        """Tell whether the configuration belongs to an adapter of a model, so that the fields of the method stay."""
        return "_attached" in vars(self)

    def mark_attached(self) -> None:
        """Make the fields of the method read-only. A copy stays read-only; `dataclasses.replace` makes a new one."""
        vars(self)["_attached"] = True

    @property
    def lora_scale(self) -> float:
        """Return what multiplies the change by LoRA, with a rank above 0."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    def _expected(self, name: str, what: str) -> str:
        """Say what was expected of a field, and what it holds."""
        return f"{type(self).__name__}.{name} must be {what}, got {shown(getattr(self, name))}"

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

    def _check_peft_fields(self) -> None:
        """Check the fields that every configuration has, from PEFT or filled in when it is attached.

        Raises:
            ValueError: one of them is of another type, or a task that no model of ours is for.
        """
        # PEFT's class for sequence to sequence asks the base model for an encoder and a decoder.
        tasks = [task.value for task in TaskType if task != TaskType.SEQ_2_SEQ_LM]
        base, targets = self.base_shape, self.target_modules
        texts = ("base_model_name_or_path", "revision", "peft_version")
        rules = [
            *((name, "None or a string", isinstance(getattr(self, name, None), str | None)) for name in texts),
            ("auto_mapping", "None or an object", isinstance(self.auto_mapping, Mapping | None)),
            ("target_modules", "None, a name or names", targets is None or _are_names(targets)),
            ("base_shape", "None or an object", base is None or (isinstance(base, Mapping) and _are_names(list(base)))),
            ("task_type", f"None or one of {', '.join(tasks)}", self.task_type is None or self.task_type in tasks),
        ]
        for name, what, is_right in rules:
            if not is_right:
                raise ValueError(self._expected(name, what))
        self._check_switches("inference_mode", "saves_embeddings")

    def _check_modules_to_save(self) -> None:
        """Make a list of the names of the modules to save, each once.

        Raises:
            ValueError: they are no names.
        """
        names = self.modules_to_save
        if names is not None:
            if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) and name for name in names):
                raise ValueError(self._expected("modules_to_save", "None or a list of names of modules"))
            self.modules_to_save = list(dict.fromkeys(names))  # PEFT's classes repeat them
        self.named_modules_to_save = list(self.modules_to_save or ())
        if self.base_shape is not None and not self.named_modules_to_save and self.task_type in TASKS_WITH_HEAD:
            # Saved by a version that knew no heads: PEFT's class for the task would look for one in the file.
            self.task_type = None


def _are_names(value: Any) -> bool:
    """Tell whether a value is a string or a collection of strings."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)
    )
