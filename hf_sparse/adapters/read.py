"""Read the files of an adapter's folder, and see that they are whole and safe. Only safetensors and JSON are opened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError

from hf_sparse.adapters.files import CONFIG, MODEL_CONFIG, WEIGHTS
from hf_sparse.atomic_files import read_object
from hf_sparse.bundled import BASE_NAME, CHECKPOINT
from hf_sparse.core.checks import shown
from hf_sparse.core.config import SparseConfig
from hf_sparse.core.registry import method_of, registered_methods
from hf_sparse.errors import DataError, HubError, WeightsError
from hf_sparse.patches.saving import INSIDE
from hf_sparse.weights import Layout, check_values, opened


@dataclass(frozen=True)
class ConfigFile:
    """Hold the content of an adapter_config.json.

    Attributes:
        content: as it stands in the file.
        config: what PEFT makes of it, such as a `SparseKConfig`.
        base_model: name of the base model, `"demo"` for the bundled checkpoint, `None` if it names none.
        model_class: name of the class that the adapter was trained on, if it says.
    """

    content: dict[str, Any]
    config: Any
    base_model: str | None
    model_class: str | None


def is_full_model(folder: Path) -> bool:
    """Tell whether a folder holds a full model (`hf_sparse.adapters.full_model`), and no adapter by itself."""
    if (folder / CONFIG).exists() or not (folder / MODEL_CONFIG).is_file():
        return False
    try:
        return INSIDE in read_object(folder / MODEL_CONFIG)
    except ValueError:
        return False


def check_complete(folder: Path, source: str) -> None:
    """Raise `HubError` for a folder that lacks the configuration or the weights; `source` is its name in messages."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickled = missing == [WEIGHTS] and (folder / "adapter_model.bin").exists()
        hint = "; its adapter_model.bin is a pickle, which hf-sparse does not load" if pickled else ""
        if CONFIG in missing and is_full_model(folder):
            hint = (
                ": it is a full model, which hf_sparse.from_pretrained loads; this needs the folder of an adapter, "
                "which save_pretrained of the loaded model writes"
            )
        raise HubError(f"{source} is not a complete adapter: {' and '.join(missing)} missing{hint}")


def read_config(folder: Path, source: str) -> ConfigFile:
    """Read the configuration of an adapter.

    Raises:
        HubError: it is damaged, or the adapter is none of hf-sparse's.
    """
    try:
        content = read_object(folder / CONFIG)
        peft_type = content.get("peft_type")
        if not isinstance(peft_type, str):
            raise ValueError(f"peft_type must be a string, got {shown(peft_type)}")
    except (ValueError, OSError) as error:
        raise HubError(f"{CONFIG} of {source} is damaged: {error}") from error
    known = registered_methods()
    if peft_type not in known:
        advice = (
            "a newer hf-sparse, or the package of its method, may know it"
            if peft_type.startswith("HF_SPARSE_")
            else "use peft.PeftModel"
        )
        raise HubError(f"{source} is an adapter of type {peft_type[:80]}, expected {' or '.join(known)}; {advice}")
    try:
        _check_keys(content, known[peft_type].config)
        config: Any = PeftConfig.from_peft_type(
            **{key: value for key, value in content.items() if key != "runtime_config"}
        )
        name = config.base_model_name_or_path or None
        if name is not None and Path(name).resolve() == CHECKPOINT.resolve():
            name = BASE_NAME
        base_shape = dict(config.base_shape or {})
        # PEFT notes the class too, but not where a configuration has a `task_type`.
        noted = dict(config.auto_mapping or {}).get("base_model_class")
        model_class = base_shape.get("model_class", noted)
        if not isinstance(model_class, str | None):
            raise ValueError(f"it names the class {shown(model_class)}")
        _check_head(base_shape.get("head"))
    except (ValueError, TypeError, OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise HubError(f"{CONFIG} of {source} is damaged: {error}") from error
    return ConfigFile(content, config, name, model_class)


def read_layouts(folder: Path, source: str, config: SparseConfig) -> dict[str, Layout]:
    """Read shape and dtype of every tensor of an adapter by key, and check its numbers.

    Raises:
        HubError: the weights are damaged, of a dtype that adapters do not have, or not finite.
    """
    try:
        with opened(folder / WEIGHTS) as (layouts, read):
            check_values(layouts, read, method_of(config).layer.unfitted)
    except (SafetensorError, OSError, WeightsError) as error:
        raise HubError(f"{WEIGHTS} of {source} is damaged: {error}") from error
    return layouts


def read_measurement(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file, `None` if there is no file.

    Raises:
        DataError: it is damaged, or holds something else.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path.name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name} must hold an object, got {type(content).__name__}")
    return content


def _check_keys(content: Mapping[str, Any], config_type: Any) -> None:
    """Raise `ValueError` for a key that is nearly that of a field which is missing: PEFT would take the default.

    Other keys that are not known may be those of a newer version, and other fields of one that did not have them yet.
    """
    names = [field.name for field in fields(config_type)]
    missing = [name for name in names if name not in content]
    for key in content.keys() - set(names):
        similar = get_close_matches(key, missing) or [name for name in missing if len(name) == len(key) == 1]
        if similar:
            raise ValueError(f"it has {shown(key)}, expected {similar[0]!r}")


def _check_head(head: Any) -> None:
    """Raise `ValueError` if this is not what is noted of a head: names of its labels, and the kind of problem."""
    if head is None:
        return
    if not isinstance(head, dict) or not isinstance(head.get("problem_type"), str | None):
        raise ValueError(f"it has the head {shown(head)}")
    labels = head.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str | int) for label in labels):
        raise ValueError(f"the labels of its head must be a list of names, got {shown(labels)}")
