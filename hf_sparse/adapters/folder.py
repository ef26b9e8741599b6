"""An adapter's two files, and whether they are whole, safe and made for a base model.

Everything here happens before any weight of a base model is read. Only safetensors and JSON are opened.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from hf_sparse.atomic_files import read_object
from hf_sparse.base_model import usable
from hf_sparse.bundled import BASE_NAME, CHECKPOINT
from hf_sparse.core.checks import shown
from hf_sparse.core.registry import method_of, registered_methods
from hf_sparse.embeddings import embeddings_of
from hf_sparse.errors import AdapterMismatchError, HubError, UnsupportedModelError, WeightsError
from hf_sparse.folders import settle
from hf_sparse.patches.attach import CHILD
from hf_sparse.patches.heads import random_weights, uncovered
from hf_sparse.weights import Layout, check_names, check_values, opened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: What was measured of it, beside them.
EVALUATION, TRAINING = "eval.json", "finetune.json"

# Of a configuration, what changes no number.
_NAMES = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type")


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter's folder.

    Attributes:
        folder: where the files are.
        source: how messages call it.
        config: the configuration of its method, such as a `SparseKConfig`.
        base_model: name of its base model, `"demo"` for the bundled checkpoint, `None` if it has none.
        layouts: shape and dtype of every tensor by key.
        model_class: name of the class that it was trained on, if it says.
    """

    folder: Path
    source: str
    config: Any
    base_model: str | None
    layouts: dict[str, Layout]
    model_class: str | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the method learns, by key; embeddings and heads that the adapter brings are not among them."""
        inside = f".{CHILD}."
        return {key: shape for key, (shape, _) in self.layouts.items() if inside in key}

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
        return sum(math.prod(shape) for key, (shape, _) in self.layouts.items() if key.startswith(modules))

    @cached_property
    def weights_sha256(self) -> str:
        """sha256 of the file with the weights: two measurements can be told to be of the same adapter."""
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()

    @cached_property
    def settings_sha256(self) -> str:
        """sha256 of the settings in the configuration: weights stay where `divide` changes what they are used for."""
        content = read_object(self.folder / CONFIG)
        settings = {name: value for name, value in content.items() if name not in _NAMES}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_adapter(folder: Path, source: str) -> Adapter:
    """Read an adapter's folder.

    Raises:
        HubError: a file is missing or damaged, weights are of a dtype that adapters do not have or not finite, or the
            adapter is none of hf-sparse's.
        BusyError: another run is replacing it.
    """
    settle(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickled = missing == [WEIGHTS] and (folder / "adapter_model.bin").exists()
        hint = "; its adapter_model.bin is a pickle, which hf-sparse does not load" if pickled else ""
        raise HubError(f"{source} is not a complete adapter: {' and '.join(missing)} missing{hint}")
    try:
        content = read_object(folder / CONFIG)
        kind = content.get("peft_type")
        if not isinstance(kind, str):
            raise ValueError(f"peft_type must be a string, got {shown(kind)}")
    except (ValueError, OSError) as error:
        raise HubError(f"{CONFIG} of {source} is damaged: {error}") from error
    known = registered_methods()
    if kind not in known:
        advice = "a newer hf-sparse may know it" if str(kind).startswith("HF_SPARSE_") else "use peft.PeftModel"
        raise HubError(f"{source} is an adapter of type {kind[:80]}, expected {' or '.join(known)}; {advice}")
    try:
        _check_keys(content, known[kind].config)
        config = PeftConfig.from_peft_type(**{key: value for key, value in content.items() if key != "runtime_config"})
        name = config.base_model_name_or_path or None
        if name is not None and Path(name).resolve() == CHECKPOINT.resolve():
            name = BASE_NAME
        # PEFT notes the class too, but not where a configuration has a `task_type`.
        noted = dict(config.auto_mapping or {}).get("base_model_class")
        model_class = dict(config.base_shape or {}).get("model_class", noted)
        if not isinstance(model_class, str | None):
            raise ValueError(f"it names the class {shown(model_class)}")
        _check_head(dict(config.base_shape or {}).get("head"))
    except (ValueError, TypeError, OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise HubError(f"{CONFIG} of {source} is damaged: {error}") from error
    try:
        with opened(folder / WEIGHTS) as (held, read):
            check_values(held, read, method_of(config).layer.unfitted)
    except (SafetensorError, OSError, WeightsError) as error:
        raise HubError(f"{WEIGHTS} of {source} is damaged: {error}") from error
    return Adapter(folder, source, config, name, held, model_class)


def _check_keys(content: Mapping[str, Any], kind: Any) -> None:
    """Raise `ValueError` for a key that is nearly that of a field which is missing: PEFT would take the default.

    Other keys that are not known may be those of a newer version, and other fields of one that did not have them yet.
    """
    names = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in content]
    for key in content.keys() - set(names):
        near = get_close_matches(key, missing) or [name for name in missing if len(name) == len(key) == 1]
        if near:
            raise ValueError(f"it has {shown(key)}, expected {near[0]!r}")


def _check_head(head: Any) -> None:
    """Raise `ValueError` if this is not what is noted of a head: names of its labels, and the kind of problem."""
    if head is None:
        return
    if not isinstance(head, dict) or not isinstance(head.get("problem_type"), str | None):
        raise ValueError(f"it has the head {shown(head)}")
    labels = head.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str | int) for label in labels):
        raise ValueError(f"the labels of its head must be a list of names, got {shown(labels)}")


def check_fit(adapter: Adapter, skeleton: PreTrainedModel, base: str) -> int | None:
    """Check that an adapter holds exactly the keys and shapes that a base model asks for.

    PEFT would leave what is missing random, and let any other key overwrite weights of the base.

    Args:
        skeleton: the base model without weights; it is used up.
        base: how messages call the base model.

    Returns:
        The number of tokens of the embeddings that the adapter brings, `None` if it leaves those of the base.

    Raises:
        AdapterMismatchError: the adapter was made for another base model, or its configuration does not fit this one.
        UnsupportedModelError: the base model has no sparse attention patch.
        HubError: keys are missing, unexpected or of another shape.
    """
    # The class that will be loaded: each asks something else of its base model.
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(adapter.config.task_type, PeftModel)
    try:
        with usable(f"{adapter.source} on a {type(skeleton).__name__}"), torch.device("meta"):
            model = kind(skeleton, copy.deepcopy(adapter.config))
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
    except UnsupportedModelError:
        raise
    except ValueError as error:  # another base model, or a layer that it does not have
        raise AdapterMismatchError(f"{adapter.source} does not fit the base model {base}: {error}") from error
    embeddings = embeddings_of(skeleton, "base_model.model.")  # without those in a head that PEFT has wrapped
    expected = {key: tuple(value.shape) for key, value in state.items() if key not in embeddings}
    try:
        tokens = check_names(adapter.layouts, expected, embeddings)
        if adapter.config.saves_embeddings and tokens is None:
            raise WeightsError("missing: the embeddings that it brings")
        return tokens
    except WeightsError as error:
        several = ";" in str(error)
        made = f"; it was made on a {adapter.model_class}: pass one as base_model=" if several else ""
        raise HubError(
            f"{WEIGHTS} of {adapter.source} does not hold the parameters for {base}; {error}{made}"
        ) from error


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
