"""Find the methods and what they can be told on the command line, without torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse import methods
from hf_sparse.cli.options import SettingsOptions
from hf_sparse.core.method_settings import MethodSettings

#: The settings of every method that has a folder in `hf_sparse.methods`, by the method's name.
METHODS: Mapping[str, MethodSettings] = {
    module.SETTINGS.name: module.SETTINGS for module in methods.import_from_each("settings")
}


def options_of(classes: Callable[[MethodSettings], Sequence[type]]) -> SettingsOptions:
    """Return the options that follow from settings.

    Args:
        classes: tells which classes of settings a method has for the verb.
    """
    return SettingsOptions(
        {name: classes(method) for name, method in METHODS.items()},
        {name: method.label for name, method in METHODS.items()},
    )


def configuration_in(folder: Path) -> dict[str, Any]:
    """Return what adapter_config.json in a folder holds.

    Nothing where it cannot be read: whoever opens the adapter says what is wrong with it.
    """
    try:
        content = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def method_in(folder: Path) -> str | None:
    """Return the name of the method of the adapter in a folder, `None` where that cannot be told."""
    peft_type = configuration_in(folder).get("peft_type")
    return next((name for name, method in METHODS.items() if method.peft_type == peft_type), None)
