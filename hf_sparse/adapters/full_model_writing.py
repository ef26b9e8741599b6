"""Write a full model: the files of a base model as they are, or with LoRA merged in, and an adapter beside them.

No model is built. Shards are linked or copied, and LoRA is added to the weights in a copy of a shard, one at a time.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.adapters.card import Form
from hf_sparse.adapters.files import INDEX, MODEL_CONFIG, SINGLE, WEIGHTS
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.full_model import full_config
from hf_sparse.atomic_files import read_object, write_json
from hf_sparse.base_model import resolve_base
from hf_sparse.core.registry import method_of
from hf_sparse.errors import HubError
from hf_sparse.patches.attached import CHILD
from hf_sparse.patches.saving import INSIDE
from hf_sparse.tuner import PREFIX

# What a full model takes over from its base model beside configuration and weights: no code and no pickles.
_OTHERS = (
    *("generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "chat_template*", "*processor_config.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Change(NamedTuple):
    """Hold what LoRA adds to a weight, as its factors: together they are as large as all weights of attention.

    Attributes:
        up: `[outputs, rank]`, scaled.
        down: `[rank, inputs]`.
        is_transposed: whether the weight is `[inputs, outputs]`.
    """

    up: Tensor
    down: Tensor
    is_transposed: bool

    def product(self) -> Tensor:
        """Compute what is added to the weight, in its shape."""
        change = self.up @ self.down
        return change.T if self.is_transposed else change


def base_files(name: str, revision: str | None, token: str | bool | None) -> Path:
    """Return the folder with the files of a base model, downloaded if need be.

    Raises:
        HTTPError, OSError: they cannot be downloaded.
        HubError: there are no weights of safetensors among them.
    """
    place = Path(resolve_base(name))
    if place.is_dir():
        return place
    patterns = [MODEL_CONFIG, SINGLE, INDEX, *_OTHERS]
    folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    if (folder / SINGLE).is_file():
        return folder
    shards = _index(folder)[1]  # by whatever names: some are called model.safetensors-00001-of-00002.safetensors
    return Path(snapshot_download(name, revision=folder.name, token=token, allow_patterns=shards))


def write_full_model(
    adapter: AdapterFolder, base: Path, skeleton: PreTrainedModel, output: Path, form: Form, *, link: bool
) -> None:
    """Write the files of a full model into a folder, without its card.

    Args:
        adapter: the adapter, checked against the base model.
        base: folder with the base model's files.
        skeleton: the base model without weights.
        output: takes the files.
        form: `"full"`, or `"merged"` for LoRA in the weights.
        link: link files that stay as they are, where the system can; otherwise they are copied.

    Raises:
        HubError: the base model's weights are not in files of safetensors with the usual names, or LoRA cannot be
            merged into them.
    """
    state = load_file(adapter.path / WEIGHTS)
    config = adapter.config_content
    changes: dict[str, _Change] = {}
    if form == "merged":
        changes, state = _changes(adapter, skeleton, state)
        config = config | {"lora_rank": 0, "lora_alpha": None}
    index, shards = _index(base)
    missing = [name for name in shards if not (base / name).is_file()]
    if missing:
        raise HubError(f"the base model is incomplete: {', '.join(missing[:3])} missing in {base}")
    places = _places(index, changes)
    number = len(shards) + 1
    names = {shard: f"model-{i:05}-of-{number:05}.safetensors" for i, shard in enumerate(shards, start=1)}
    for shard, name in names.items():
        merged = {key: changes[change] for change, key in places.items() if index["weight_map"][key] == shard}
        _place(base / shard, output / name, link=link and not merged)
        _add(output / name, merged)
    last = f"model-{number:05}-of-{number:05}.safetensors"
    inside = {f"{INSIDE}.{key.removeprefix(PREFIX)}": tensor for key, tensor in state.items()}
    save_file(inside, output / last, metadata={"format": "pt"})
    shutil.copymode(adapter.path / WEIGHTS, output / last)  # safetensors lets nobody but the owner read what it writes
    size = index["metadata"].get("total_size", 0) + sum(tensor.nbytes for tensor in inside.values())
    weight_map = {key: names[shard] for key, shard in index["weight_map"].items()}
    weight_map |= dict.fromkeys(inside, last)
    write_json(output / INDEX, {"metadata": index["metadata"] | {"total_size": size}, "weight_map": weight_map})
    write_json(output / MODEL_CONFIG, full_config(read_object(base / MODEL_CONFIG), config, form))
    for pattern in _OTHERS:
        for path in sorted(base.glob(pattern)):
            if path.is_file() and not (output / path.name).exists():
                _place(path, output / path.name, link=link)


def _index(base: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the index of a base model's tensors, made up for a single file, and the names of its shards in order.

    A full model as the base model brings the weights of its own base model.
    """
    if (base / SINGLE).is_file():  # which transformers reads where there is an index too
        with safe_open(base / SINGLE, framework="pt") as file:
            keys = list(file.keys())
        index: dict[str, Any] = {"weight_map": dict.fromkeys(keys, SINGLE)}
        index["metadata"] = {"total_size": _data_size(base / SINGLE)}
    elif (base / INDEX).is_file():
        index = read_object(base / INDEX, most=2**28)
    else:
        raise HubError(f"expected the base model's weights in {SINGLE} or {INDEX}, got neither in {base}")
    shards = {key: name for key, name in index["weight_map"].items() if not key.startswith(f"{INSIDE}.")}
    if wrong := [name for name in shards.values() if Path(name).name != name]:
        raise HubError(f"{INDEX} of the base model is damaged: expected names of files, got {wrong[0][:200]!r}")
    return {"metadata": dict(index.get("metadata") or {}), "weight_map": shards}, sorted(set(shards.values()))


def _changes(
    adapter: AdapterFolder, skeleton: PreTrainedModel, state: dict[str, Tensor]
) -> tuple[dict[str, _Change], dict[str, Tensor]]:
    """Return what LoRA adds to weights, by their names in the model, and the tensors of the adapter without LoRA.

    Raises:
        HubError: the adapter has no LoRA.
    """
    if not adapter.config.lora_rank:
        raise HubError(f"{adapter.source} has no LoRA to merge (lora_rank is 0): publish it as full")
    inside = f".{CHILD}.{method_of(adapter.config).layer.adapter_layer_names[1]}."
    changes = {}
    for key in [key for key in state if inside in key and key.endswith("_A")]:
        module, _, linear = key.removeprefix(PREFIX).removesuffix("_A").partition(inside)
        down, up = state[key].float(), state[f"{key.removesuffix('_A')}_B"].float()
        is_transposed = isinstance(skeleton.get_submodule(f"{module}.{linear}"), Conv1D)
        changes[f"{module}.{linear}.weight"] = _Change(adapter.config.lora_scale * up, down, is_transposed)
    return changes, {key: tensor for key, tensor in state.items() if inside not in key}


def _places(index: Mapping[str, Any], changes: Mapping[str, _Change]) -> dict[str, str]:
    """Find the key in the checkpoint of each weight that changes; it may lack the first part of the model's name.

    Raises:
        HubError: the checkpoint holds a weight under another name.
    """
    keys: Mapping[str, str] = index["weight_map"]
    places = {}
    for name in changes:
        fits = [key for key in (name, name.partition(".")[2]) if key in keys]
        fits = fits or [key for key in keys if key.endswith(f".{name}")]
        if len(fits) != 1:
            raise HubError(
                f"expected one tensor {name} in the base model's checkpoint, got {len(fits)}: LoRA cannot be merged "
                "into it, publish as full or as an adapter"
            )
        places[name] = fits[0]
    return places


def _add(path: Path, changes: Mapping[str, _Change]) -> None:
    """Add to tensors of a safetensors file in place, one after the other: names, shapes and dtypes stay.

    Raises:
        HubError: a tensor has another shape than its change, or is quantised.
    """
    if not changes:
        return
    offsets = dict(_offsets(path))
    with safe_open(path, framework="pt") as file, path.open("r+b") as raw:
        for key, change in changes.items():
            weight, added = file.get_tensor(key), change.product()
            if weight.dtype not in _DTYPES or weight.shape != added.shape:
                raise HubError(
                    f"expected {key} of the base model in float and of shape {list(added.shape)}, got {weight.dtype} "
                    f"of {list(weight.shape)}: LoRA cannot be merged into it, publish as full or as an adapter"
                )
            merged = (weight.float() + added).to(weight.dtype)
            raw.seek(offsets[key])
            raw.write(merged.contiguous().view(torch.uint8).numpy().tobytes())
        raw.flush()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a safetensors file begins, and its header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def _offsets(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the name of each tensor in a safetensors file, and where its bytes begin."""
    start, header = _header(path)
    for key, entry in header.items():
        if key != "__metadata__":
            yield key, start + entry["data_offsets"][0]


def _data_size(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file."""
    return path.stat().st_size - _header(path)[0]


def _place(source: Path, target: Path, *, link: bool) -> None:
    """Bring a file to another place, as a link if that is wanted and possible."""
    if link:
        try:
            os.symlink(source.resolve(), target)
            return
        except OSError:  # a system or a user without links
            pass
    shutil.copyfile(source, target)
