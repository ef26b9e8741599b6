"""Read a full model: a checkpoint of transformers with an adapter inside.

Its config.json is that of the base model and has one key more, `hf_sparse`, with the adapter's configuration. Its
weights are shards of safetensors with an index; the last shard holds the adapter's tensors, whose names begin with
`hf_sparse.`. transformers alone loads the base model and warns of these tensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_sparse.adapters.card import Form
from hf_sparse.adapters.files import CONFIG, INDEX, MODEL_CONFIG, SINGLE, WEIGHTS
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.atomic_files import read_object
from hf_sparse.base_model import INSIDE
from hf_sparse.core.checks import shown
from hf_sparse.errors import HubError
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


def adapter_shard(folder: Path, source: str) -> str:
    """Return the name of the shard of a full model that holds the adapter.

    Raises:
        HubError: the index is damaged, or names no such shard, or one beside the folder.
    """
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        raise HubError(
            f"expected the weights of the full model {source} in the shards of {INDEX}, got "
            f"{SINGLE if (folder / SINGLE).exists() else 'no such file'}: {_SAVED_AGAIN}"
        )
    try:
        shards = read_object(folder / INDEX, most=2**28).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"weight_map must be an object, got {type(shards).__name__}")
        names = {name for key, name in shards.items() if key.startswith(f"{INSIDE}.")}
        for name in shards.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it must name files of safetensors in the folder, got {shown(name)}")
        if len(names) > 1:
            raise ValueError(f"the tensors {INSIDE}.* must be in one file, got {len(names)}")
    except (ValueError, OSError) as error:
        raise HubError(f"{INDEX} of {source} is damaged: {error}") from error
    if not names:
        raise HubError(
            f"{MODEL_CONFIG} of {source} says that the model is sparse, and its weights are those of the dense base "
            f"model alone (no tensor {INSIDE}.* in {INDEX}): {_SAVED_AGAIN}"
        )
    return names.pop()


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
    shard = adapter_shard(folder, source)
    try:
        with safe_open(folder / shard, framework="pt") as file:
            keys = list(file.keys())
            state = {
                PREFIX + key.removeprefix(f"{INSIDE}."): file.get_tensor(key)
                for key in keys
                if key.startswith(f"{INSIDE}.")
            }
    except (SafetensorError, OSError) as error:
        raise HubError(f"{shard} of {source} is damaged: {error}") from error
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    return AdapterFolder(target, source)
