"""On what machine and versions a number was measured. No host names, no paths."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """`{"machine": ..., "versions": ...}` for the JSON of a measurement."""
    machine: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    packages = ("hf-sparse", "torch", "transformers", "peft", "accelerate")
    return {"machine": machine, "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}}}
