"""Modules of the base model, such as its head, that are trained and saved with an adapter."""

from dataclasses import dataclass, field

from peft import PeftConfig

from hf_sparse.core.checks import shown

# PEFT's task types whose classes add names to `modules_to_save`.
TASKS_WITH_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})


@dataclass
class SavedModules(PeftConfig):
    """The setting `modules_to_save` in the configuration of every method; PEFT itself wraps, trains and saves them.

    Attributes:
        named_modules_to_save: the names that the configuration was made with. PEFT's classes for task types add theirs
            to `modules_to_save` before any model sees it, those of an adapter that was saved without a head too.
    """

    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules of the base model that are trained and saved with the adapter, such as its head. With the "
            "task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS the head is among them, and need not be named."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.modules_to_save
        if names is not None:
            if not isinstance(names, list | tuple | set):
                raise ValueError(self._not_names())
            if not all(isinstance(name, str) and name for name in names):
                raise ValueError(self._not_names())
            self.modules_to_save = list(dict.fromkeys(names))  # PEFT's classes repeat them
        self.named_modules_to_save = list(self.modules_to_save or ())
        if getattr(self, "base_shape", None) is not None and not self.named_modules_to_save:
            # Saved by a version that knew no heads: PEFT's class for the task would look for one in the file.
            self.task_type = None if self.task_type in TASKS_WITH_HEAD else self.task_type

    def _not_names(self) -> str:
        return (
            f"{type(self).__name__}.modules_to_save must be None or a list of names of modules, "
            f"got {shown(self.modules_to_save)}"
        )
