"""Checkpoints of a run: safetensors and JSON, each folder whole or not there."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_sparse.errors import DataError

FOLDER = "checkpoints"


def save(
    output: Path, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write `checkpoints/step-N`; older ones go once it is there."""
    root = output / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / f"step-{step:06d}", root / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    names = {parameter: name for name, parameter in parameters.items()}
    moments = {
        f"{names[parameter]}|{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, partial / "scorers.safetensors")
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"format": 1, "step": step, **state}))
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    for other in root.glob("step-*"):
        if other != final:
            shutil.rmtree(other)


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = sorted((output / FOLDER).glob("step-*"))
    return found[-1] if found else None


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`, and `step`.

    Raises:
        DataError: the checkpoint is damaged.
    """
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"the checkpoint {folder.name} is damaged ({error}); delete it to start over") from error


def load(folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put parameters and optimiser state back, in place.

    Raises:
        DataError: the checkpoint is damaged, or has other parameters.
    """
    try:
        weights = load_file(folder / "scorers.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
    except Exception as error:  # safetensors raises its own kinds
        raise DataError(f"the checkpoint {folder.name} is damaged ({error}); delete it to start over") from error
    if {name: w.shape for name, w in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise DataError(f"the checkpoint {folder.name} belongs to another model: its parameters are not the same")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for key, value in moments.items():
        name, _, entry = key.rpartition("|")
        parameter = parameters[name]
        # AdamW keeps its step counts on the CPU.
        optimizer.state[parameter][entry] = value if entry == "step" else value.to(parameter.device)
