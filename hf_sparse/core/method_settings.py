"""Describe a method by what can be known of it without torch."""

from dataclasses import dataclass

from hf_sparse.core.adapter_settings import AdapterSettings
from hf_sparse.core.settings import TrainingSettings


@dataclass(frozen=True)
class NoSettings:
    """Hold no settings: those of a method that has none of a kind."""


@dataclass(frozen=True)
class MethodSettings:
    """Describe one method: its names and its settings, of whose fields the command line makes its options.

    Every folder of a method has a module `settings` with one of these, named `SETTINGS`.

    Attributes:
        name: the name on the command line, as in the method's `hf_sparse.core.registry.Method`.
        label: the name in sentences and headings.
        summary: a few words that follow the name and a colon.
        peft_type: the name in PEFT and in an `adapter_config.json`.
        adapter: the class of the settings of an adapter, from which the method's configuration inherits.
        training: the class of the training settings that only this method has.
        evaluation: the class of the settings of measuring that only this method has, a frozen dataclass.
    """

    name: str
    label: str
    summary: str
    peft_type: str
    adapter: type[AdapterSettings]
    training: type[TrainingSettings] = TrainingSettings
    evaluation: type = NoSettings
