"""Hold what the configurations of all methods have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig, TaskType

from hf_sparse.core.adapter_settings import AdapterSettings

#: PEFT's task types whose classes add names to `modules_to_save`.
TASKS_WITH_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})

#: Fields that PEFT or this package fills in for an adapter that is attached already.
FILLED_IN = frozenset(
    {*(f.name for f in fields(PeftConfig)), "modules_to_save", "saves_embeddings", "target_modules", "base_shape"}
)


@dataclass
class SparseConfig(AdapterSettings, PeftConfig):
    """Hold the settings of one adapter. Each method has a subclass with fields of its own.

    The fields that are not PEFT's, and their checks, are those of `AdapterSettings`, which the command line can read
    without torch.

    Once it is attached to a model, the fields of the method are read-only: what was built from them would not follow.

    Attributes:
        named_modules_to_save: the names that the configuration was made with. PEFT's classes for task types add theirs
            to `modules_to_save` before any model sees it, those of an adapter that was saved without a head too.
    """

    def __post_init__(self) -> None:
        self._check_peft_fields()
        PeftConfig.__post_init__(self)
        self._check_modules_to_save()
        self.check_settings()

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
