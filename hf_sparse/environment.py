"""Describe the machine and versions of a measurement, without host names and paths, and the role of this process.

Launchers (`torchrun`, `accelerate launch`) tell the processes that they start together by `RANK` and `LOCAL_RANK`.
"""

import os
import platform
from importlib.metadata import version
from typing import Any


def describe(*further: str) -> dict[str, Any]:
    """Return `{"machine": ..., "versions": ...}` for the JSON of a measurement.

    Args:
        *further: packages that took part besides those that always do.
    """
    import torch  # the command line asks the functions below without it

    machine: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    packages = ("hf-sparse", "torch", "transformers", "peft", "accelerate", *further)
    return {"machine": machine, "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}}}


def is_launched() -> bool:
    """Tell whether a launcher started this process. Clusters set `RANK` alone where a process works for itself."""
    return "LOCAL_RANK" in os.environ


def launched_processes() -> int:
    """Count the processes that were launched together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1


def is_main_process() -> bool:
    """Tell whether this process is the one that writes and prints, of those that were launched together."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"


def cuda_of_process() -> str:
    """Name the GPU of this process: the current one, or its own if several were launched together."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if is_launched() else "cuda"
