"""Write and read the checkpoints of a run: each a folder that is whole or not there, with the files of one step."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from hf_sparse.core.checks import is_finite, is_integer
from hf_sparse.errors import DataError

FOLDER = "checkpoints"

_PARAMETERS, _OPTIMIZER, _STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"
_EARLIER_PARAMETERS = "scorers.safetensors"  # the name in checkpoints that were written before there were other methods
_LONGEST = 1e10  # seconds, three centuries
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter

# What a state holds besides what `save` adds, with its type.
_ENTRIES: dict[str, type] = {"settings": dict, "history": list, "report": dict}


def save(
    output: Path, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write `checkpoints/step-N`; older ones go once it is there.

    Raises:
        OSError: it cannot be written; older ones stay.
    """
    root = output / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    partial = root / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    names = {parameter: name for name, parameter in parameters.items()}
    moments = {
        f"{names[parameter]}|{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    try:
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, partial / _PARAMETERS)
        save_file(moments, partial / _OPTIMIZER)
        files = {name: _sha256((partial / name).read_bytes()) for name in (_PARAMETERS, _OPTIMIZER)}
        content = {"format": 2, "step": step, **state, "files": files}
        content = json.loads(json.dumps(content))  # tuples become lists, as they will be read
        (partial / _STATE).write_text(json.dumps({**content, "sha256": _state_sha256(content)}), "utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Hidden it is whole already, and the newest; a number may be lower than that of an earlier run.
    os.replace(partial, root / f".step-{step:06d}")
    recover(output)


def recover(output: Path) -> None:
    """Finish or remove what a killed run left, and every checkpoint but the newest.

    Raises:
        DataError: a file has the name of a checkpoint.
    """
    root = output / FOLDER
    shutil.rmtree(root / ".partial", ignore_errors=True)
    for path in _named(root, r"step-\d+"):
        if not path.is_dir():
            raise DataError(f"{path} is a file, and checkpoints of such names are folders: move it")
    newest = latest(output)
    for path in _named(root, r"\.?step-\d+"):
        if path != newest:
            shutil.rmtree(path)
    if newest and newest.name.startswith("."):
        os.replace(newest, newest.with_name(newest.name.removeprefix(".")))


def latest(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one."""
    hidden, shown = (
        [path for path in _named(output / FOLDER, pattern) if path.is_dir()] for pattern in (r"\.step-\d+", r"step-\d+")
    )
    return max(hidden or shown, key=_step_of, default=None)


def checkpoints(output: Path) -> list[str]:
    """List the relative paths of all checkpoints in a folder, and of what killed runs left of some."""
    return [f"{FOLDER}/{path.name}" for path in _named(output / FOLDER, r"\.?step-\d+|\.partial")]


def load_state(folder: Path) -> dict[str, Any]:
    """Return what `save` was given as `state`, and `step`.

    Raises:
        DataError: the checkpoint is damaged.
    """
    try:
        state = json.loads((folder / _STATE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(state, dict):
        raise _damaged(folder, f"{_STATE} must hold an object, got {type(state).__name__}")
    if state.get("format") not in (1, 2) or not is_integer(state["format"], 1):
        raise _damaged(folder, f"{_STATE} must have the format 1 or 2, got {state.get('format')!r}")
    for key, kind in _ENTRIES.items():
        if not isinstance(state.get(key), kind):
            raise _damaged(folder, f"{key} must be a {kind.__name__}, got {type(state.get(key)).__name__}")
    step, seconds = state.get("step"), state.get("seconds", -1)
    if not is_integer(step, 1) or not is_finite(seconds) or not 0 <= seconds < _LONGEST:
        raise _damaged(folder, f"expected a step of at least 1 and its seconds, got {step!r} and {seconds!r}")
    if step != _step_of(folder):
        raise _damaged(folder, f"it is of step {step}")
    rows = [row.get("step") if isinstance(row, dict) else None for row in state["history"]]
    if rows != list(range(1, step + 1)):
        raise _damaged(folder, f"its history is not that of steps 1 to {step}")
    if not all(isinstance(row.get("loss"), float) and math.isfinite(row["loss"]) for row in state["history"]):
        raise _damaged(folder, "its history has a step without a finite loss")
    if not all(isinstance(part, dict) for part in state["report"].values()):
        raise _damaged(folder, "its report is not one of hf-sparse")
    if state["format"] == 1:  # of hf-sparse before it noted what belongs together
        return state
    try:
        digest = _state_sha256({key: value for key, value in state.items() if key != "sha256"})
    except RecursionError as error:
        raise _damaged(folder, error) from error
    if state.get("sha256") != digest:
        raise _damaged(folder, f"{_STATE} is not as it was written")
    if not isinstance(state.get("files"), dict) or not isinstance(state.get("origin"), dict):
        raise _damaged(folder, f"{_STATE} does not say what belongs to it")
    return state


def load_into(
    folder: Path, state: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put parameters and optimiser state back, in place, once all of both is known to be right.

    Args:
        folder: of the checkpoint.
        state: what `load_state` returned.
        parameters: by name, all that are trained.
        optimizer: AdamW over them.

    Raises:
        DataError: the checkpoint is damaged, its files are of several, or it has other parameters.
    """
    weights, moments = (_tensors(folder, name, state) for name in (_parameters_file(folder, state), _OPTIMIZER))
    if {name: w.shape for name, w in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise DataError(f"the checkpoint {folder.name} belongs to another model: its parameters are not the same")
    for name, weight in weights.items():
        if weight.dtype != parameters[name].dtype:
            raise _damaged(folder, f"{name} must be {parameters[name].dtype}, got {weight.dtype}")
        if not weight.isfinite().all():
            raise _damaged(folder, f"{name} is not finite")
    kept: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, entry = key.rpartition("|")
        if name not in parameters or entry not in _MOMENTS:
            raise _damaged(folder, f"{_OPTIMIZER} has the entry {key!r}")
        shape = () if entry == "step" else parameters[name].shape
        if value.shape != shape or not value.is_floating_point() or not value.isfinite().all():
            raise _damaged(folder, f"{key} must be finite floating point numbers of the shape {list(shape)}")
        if entry != "exp_avg" and value.min() < 0:
            raise _damaged(folder, f"{key} must not be negative")
        kept.setdefault(name, {})[entry] = value
    for name, entries in kept.items():
        if entries.keys() != set(_MOMENTS):
            raise _damaged(folder, f"{_OPTIMIZER} has only {', '.join(sorted(entries))} of {name}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, entries in kept.items():
        parameter = parameters[name]
        for entry, value in entries.items():
            # AdamW keeps its step counts on the CPU.
            optimizer.state[parameter][entry] = value if entry == "step" else value.to(parameter.device)


def check_steps(folder: Path, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Check that a loaded optimiser has made as many steps as the stage that the checkpoint is in.

    Raises:
        DataError: it has made another number.
    """
    counts = {int(state["step"]) for state in optimizer.state.values()}
    if counts != {steps}:
        made = " or ".join(map(str, sorted(counts))) or "none"
        raise _damaged(folder, f"{_OPTIMIZER} has made {made} steps of the stage, and {_STATE} tells of {steps}")


def _parameters_file(folder: Path, state: Mapping[str, Any]) -> str:
    """Return the name of the file with the parameters of a checkpoint.

    The state tells it; of the oldest ones, whose state names no files, it is that of the file that is there.
    """
    names = state["files"] if "files" in state else [path.name for path in folder.iterdir()]
    return _EARLIER_PARAMETERS if _EARLIER_PARAMETERS in names else _PARAMETERS


def _tensors(folder: Path, name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a file of a checkpoint, which must be the one that the state tells of."""
    try:
        content = (folder / name).read_bytes()
        if "files" in state and state["files"].get(name) != _sha256(content):
            raise _damaged(folder, f"{name} is not the file that {_STATE} tells of")
        return load(content)
    except DataError:
        raise
    except Exception as error:  # safetensors raises its own kinds, and torch what it likes
        raise _damaged(folder, f"{name}: {error}") from error


def _named(root: Path, pattern: str) -> list[Path]:
    """List the entries of a folder whose names match; other names, and links, are somebody else's."""
    if not root.is_dir():
        return []
    return [path for path in sorted(root.iterdir()) if re.fullmatch(pattern, path.name, re.A) and not path.is_symlink()]


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _state_sha256(state: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(state, sort_keys=True).encode())


def _damaged(folder: Path, why: Any) -> DataError:
    line = " ".join(str(why).split())
    return DataError(f"the checkpoint {folder.name} is damaged ({line}); delete it to start over")
