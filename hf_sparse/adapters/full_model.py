"""Read a full model: a checkpoint of transformers with an adapter inside.

Its config.json is that of the base model and has one key more, `hf_sparse`, with the adapter's configuration. Its
weights are files of safetensors, in which the names of the adapter's tensors begin with `hf_sparse.`. What is pushed or
written by `save_full_model` has them in the last of several shards, with an index; what `save_pretrained` of a patched
model writes (`hf_sparse.patches.saving`), among the others. transformers alone loads the base model and warns of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_sparse.adapters.card import Form
from hf_sparse.adapters.files import CONFIG, INDEX, MODEL_CONFIG, SINGLE, WEIGHTS
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.atomic_files import read_object
from hf_sparse.core.checks import shown
from hf_sparse.errors import HubError
from hf_sparse.patches.saving import INSIDE
from hf_sparse.tuner import PREFIX

_SAVED_AGAIN = "something that does not know hf-sparse saved it again, or only a part was downloaded"


def check_form(form: Form, known: tuple[Form, ...]) -> None:
    """Raise `ValueError` for a form that is none of those that are known."""
    if form not in known:
        raise ValueError(f"form must be one of {', '.join(known)}, got {form!r}")


def full_config(model: Mapping[str, Any], config: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Return the content of a full model's config.json.

    Args:
        model: content of the base model's config.json.
        config: content of the adapter's adapter_config.json.
        form: `"full"` or `"merged"`.
    """
    content = {key: value for key, value in model.items() if key != "auto_map"}  # code that is not in the folder
    return {**content, INSIDE: {"form": form, "adapter": dict(config)}}


def adapter_files(folder: Path, source: str) -> list[str]:
    """Return the names of the files of a full model that hold the adapter.

    Raises:
        HubError: the file of all weights or the index is damaged, or holds no adapter, or names files elsewhere.
    """
    if (folder / SINGLE).exists():  # which transformers reads where there is an index too
        name, shards = SINGLE, dict.fromkeys(_keys(folder / SINGLE, source), SINGLE)
    elif (folder / INDEX).exists():
        name, shards = INDEX, _shards(folder, source)
    else:
        raise HubError(f"expected the weights of the full model {source} in {SINGLE} or {INDEX}, got neither")
    names = {file for key, file in shards.items() if key.startswith(f"{INSIDE}.")}
    if not names:
        raise HubError(
            f"{MODEL_CONFIG} of {source} says that the model is sparse, and its weights are those of the dense base "
            f"model alone (no tensor {INSIDE}.* in {name}): {_SAVED_AGAIN}"
        )
    return sorted(names)


def _shards(folder: Path, source: str) -> dict[str, str]:
    """Return the file of each tensor, as the index of a full model says."""
    try:
        shards = read_object(folder / INDEX, most=2**28).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"weight_map must be an object, got {type(shards).__name__}")
        for name in shards.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it must name files of safetensors in the folder, got {shown(name)}")
    except (ValueError, OSError) as error:
        raise HubError(f"{INDEX} of {source} is damaged: {error}") from error
    return shards


def _keys(path: Path, source: str) -> list[str]:
    """Return the names of the tensors in a file of a full model."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise HubError(f"{path.name} of {source} is damaged: {error}") from error


def unpack_adapter(
    folder: Path, target: Path, source: str, base_model: str, revision: str | None = None
) -> AdapterFolder:
    """Write the adapter of a full model into a folder of its own and open it.

    Args:
        folder: of the full model.
        target: an empty folder.
        source: the name of the full model in messages.
        base_model: the name that the adapter gives its base model, which is the full model itself.
        revision: of that on the Hub.

    Raises:
        HubError: it is damaged, or holds no adapter of hf-sparse.
    """
    inside = read_object(folder / MODEL_CONFIG)[INSIDE]
    if not isinstance(inside, dict) or not isinstance(inside.get("adapter"), dict):
        raise HubError(f"{MODEL_CONFIG} of {source} is damaged: expected the adapter's configuration in {INSIDE}")
    config = inside["adapter"] | {"base_model_name_or_path": base_model, "revision": revision}
    (target / CONFIG).write_text(json.dumps(config), "utf-8")
    state: dict[str, Tensor] = {}
    for name in adapter_files(folder, source):
        keys = [key for key in _keys(folder / name, source) if key.startswith(f"{INSIDE}.")]
        try:
            with safe_open(folder / name, framework="pt") as file:
                state |= {PREFIX + key.removeprefix(f"{INSIDE}."): file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise HubError(f"{name} of {source} is damaged: {error}") from error
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    return AdapterFolder(target, source)
