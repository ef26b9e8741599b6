"""An adapter's two files, and whether they are whole, safe and made for a base model.

Everything here happens before any weight of a base model is read. Only safetensors and JSON are opened.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from hf_sparse.demo import BASE_NAME, CHECKPOINT
from hf_sparse.errors import AdapterMismatchError, HubError
from hf_sparse.methods import registered_methods
from hf_sparse.patches.heads import random_weights, uncovered
from hf_sparse.tasks import task_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: What was measured of it, beside them.
EVALUATION, TRAINING = "eval.json", "finetune.json"


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter's folder.

    Attributes:
        folder: where the files are.
        source: how messages call it.
        config: the configuration of its method, such as a `SparseKConfig`.
        base_model: name of its base model, `"demo"` for the bundled checkpoint, `None` if it has none.
        shapes: shape of every tensor by key.
        model_class: name of the class that it was trained on, if it says.
    """

    folder: Path
    source: str
    config: Any
    base_model: str | None
    shapes: dict[str, tuple[int, ...]]
    model_class: str | None

    @property
    def head(self) -> dict[str, Any]:
        """Settings of the base model's configuration that belong to a head in the adapter; empty without one."""
        noted = dict(self.config.base_shape or {}).get("head")
        if noted is None or not self.config.named_modules_to_save:
            return {}
        labels = dict(enumerate(noted["labels"]))
        settings = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
        problem = noted.get("problem_type")
        return settings if problem is None else settings | {"problem_type": problem}

    @property
    def head_parameters(self) -> int:
        """How many of its parameters belong to modules of the base model, such as a head, and not to the method."""
        modules = tuple(f"base_model.model.{name}." for name in self.config.named_modules_to_save)
        return sum(math.prod(shape) for key, shape in self.shapes.items() if key.startswith(modules))

    @cached_property
    def weights_sha256(self) -> str:
        """sha256 of the file with the weights: two measurements can be told to be of the same adapter."""
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()


def resolve_base(name: str) -> str:
    """What transformers can load for the name of a base model: `"demo"` is the bundled checkpoint, always."""
    return str(CHECKPOINT) if name == BASE_NAME else name


def read_adapter(folder: Path, source: str) -> Adapter:
    """Read an adapter's folder.

    Raises:
        HubError: a file is missing or damaged, or the adapter is none of hf-sparse's.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickled = missing == [WEIGHTS] and (folder / "adapter_model.bin").exists()
        hint = "; its adapter_model.bin is a pickle, which hf-sparse does not load" if pickled else ""
        raise HubError(f"{source} is not a complete adapter: {' and '.join(missing)} missing{hint}")
    try:
        kind = json.loads((folder / CONFIG).read_text("utf-8"))["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise HubError(f"{CONFIG} of {source} is damaged: {error!r}") from error
    known = registered_methods()
    if kind not in known:
        advice = "a newer hf-sparse may know it" if str(kind).startswith("HF_SPARSE_") else "use peft.PeftModel"
        raise HubError(f"{source} is an adapter of type {kind}, expected {' or '.join(known)}; {advice}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        name = config.base_model_name_or_path or None
        if name is not None and Path(name).resolve() == CHECKPOINT.resolve():
            name = BASE_NAME
        # PEFT notes the class too, but not where a configuration has a `task_type`.
        noted = dict(config.auto_mapping or {}).get("base_model_class")
        model_class = dict(config.base_shape or {}).get("model_class", noted)
        if not isinstance(model_class, str | None):
            raise TypeError(f"it names the class {model_class!r}")
        _check_head(dict(config.base_shape or {}).get("head"))
    except (ValueError, TypeError) as error:
        raise HubError(f"{CONFIG} of {source} is damaged: {error}") from error
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise HubError(f"{WEIGHTS} of {source} is damaged: {error}") from error
    return Adapter(folder, source, config, name, shapes, model_class)


def _check_head(head: Any) -> None:
    """Raise `TypeError` if this is not what is noted of a head: names of its labels, and the kind of problem."""
    if head is None:
        return
    if not isinstance(head, dict) or not isinstance(head.get("problem_type"), str | None):
        raise TypeError(f"it has the head {head!r}")
    labels = head.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str | int) for label in labels):
        raise TypeError(f"the labels of its head must be a list of names, got {labels!r}")


def skeleton_of(
    name: str, model_class: str | None = None, head: Mapping[str, Any] | None = None, **options: Any
) -> PreTrainedModel:
    """A base model without weights, made from nothing but its config.json.

    Args:
        name: what `resolve_base` takes.
        model_class: see `hf_sparse.tasks.task_of`.
        head: settings to replace in its configuration, such as `Adapter.head`.
        **options: where to find it: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        HubError: the base model is an adapter itself.
        OSError: transformers cannot read its configuration.
        ValueError: it needs code from its repository, or transformers has no class for its task.
    """
    if name.count("/") > 1 and not Path(resolve_base(name)).is_dir():
        raise FileNotFoundError("this names a folder, and it is not here")
    adapted = HubError(f"the base model {name!r} holds an adapter itself; load it yourself and pass it as base_model=")
    try:
        config = AutoConfig.from_pretrained(resolve_base(name), trust_remote_code=False, **{**options, **(head or {})})
    except (OSError, ValueError):
        if (Path(resolve_base(name)) / CONFIG).is_file():
            raise adapted from None
        raise
    # transformers would put that adapter on the base without a word, from a pickle if that is what there is.
    if find_adapter_config_file(resolve_base(name), **options) is not None:
        raise adapted
    with torch.device("meta"):
        return task_of(config, model_class).auto.from_config(config, trust_remote_code=False)


def check_fit(adapter: Adapter, skeleton: PreTrainedModel, base: str) -> None:
    """Check that an adapter holds exactly the keys and shapes that a base model asks for.

    PEFT would leave what is missing random, and let any other key overwrite weights of the base.

    Args:
        skeleton: the base model without weights; it is used up.
        base: how messages call the base model.

    Raises:
        AdapterMismatchError: the adapter was made for another base model.
        UnsupportedModelError: the base model has no sparse attention patch.
        HubError: keys are missing, unexpected or of another shape.
    """
    try:
        with torch.device("meta"):
            model = PeftModel(skeleton, copy.deepcopy(adapter.config))
    except AdapterMismatchError as error:
        raise AdapterMismatchError(f"{adapter.source} does not fit the base model {base}: {error}") from error
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {key: tuple(value.shape) for key, value in state.items()}
    faults = {
        "missing": sorted(expected.keys() - adapter.shapes.keys()),
        "unexpected": sorted(adapter.shapes.keys() - expected.keys()),
        "of another shape": [key for key, shape in expected.items() if adapter.shapes.get(key, shape) != shape],
    }
    found = [f"{kind}: {_some(keys)}" for kind, keys in faults.items() if keys]
    if found:
        made = f"; it was made on a {adapter.model_class}: pass one as base_model=" if len(found) > 1 else ""
        raise HubError(
            f"{WEIGHTS} of {adapter.source} does not hold the parameters for {base}; {'; '.join(found)}{made}"
        )


def check_loaded(adapter: Adapter, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Check that the base model or the adapter has every weight: transformers makes missing ones up.

    A pooler that nothing follows is left out: it takes no part in the states that a bare encoder is used for.

    Args:
        missing: names of the parameters that the checkpoint of the base model did not hold, or in another shape.

    Raises:
        AdapterMismatchError: neither has them.
    """
    made_up = uncovered(missing, adapter.config.named_modules_to_save)
    if model.base_model is model:
        made_up = uncovered(made_up, ["pooler"])
    if made_up:
        raise AdapterMismatchError(f"{adapter.source} does not fit: {random_weights(model, made_up)}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
