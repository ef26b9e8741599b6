"""Write finetune.json, the metrics of a run, and read what an earlier run left there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse.atomic_files import write_json

_NAME = "finetune.json"


def write_metrics(output: Path, metrics: Mapping[str, Any]) -> None:
    """Write the metrics into a folder, unless it holds an adapter: they would be beside weights that are not theirs.

    Whoever writes the new weights there writes the metrics too. Until then the finetune.json of an earlier run, if
    there is one, says to which weights it belongs.
    """
    if (output / "adapter_config.json").exists():
        _name_weights(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / _NAME, dict(metrics))


def weights_after(output: Path, state: Mapping[str, Any]) -> str | None:
    """Return the sha256 of the weights that the run of a checkpoint ended with.

    Args:
        output: its folder.
        state: of the checkpoint.

    Returns:
        `None` if the run has not ended, or the finetune.json in the folder is of another one.
    """
    try:
        run = earlier_metrics(output)["parameters_sha256"]
        return str(run["after"]) if run["before"] == state["origin"]["first_weights"] else None
    except (LookupError, TypeError):  # a damaged one tells nothing
        return None


def earlier_metrics(output: Path) -> dict[str, Any]:
    """Return the finetune.json that an earlier run left in a folder; nothing if there is none, or a damaged one."""
    try:
        metrics = json.loads((output / _NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def _name_weights(output: Path) -> None:
    """Note in the finetune.json of an earlier run which weights it is about, before others take their place."""
    try:
        metrics = json.loads((output / _NAME).read_text("utf-8"))
        weights = (output / "adapter_model.safetensors").read_bytes()
    except (OSError, ValueError, RecursionError):  # there is none, or it is damaged and nobody will show it
        return
    if isinstance(metrics, dict) and "weights_sha256" not in metrics:
        write_json(output / _NAME, metrics | {"weights_sha256": hashlib.sha256(weights).hexdigest()})
