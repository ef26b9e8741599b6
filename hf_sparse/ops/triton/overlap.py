"""Let the programs of a launch take their places while the last ones of the launch before still run.

Between two launches a GPU waits for all programs of the first to end and for the second to be distributed: microseconds
that short texts notice. GPUs of compute capability 9 and above can distribute a launch before (NVIDIA: programmatic
dependent launch). Its programs begin by `wait_for_last`, behind which all memory is as the launch before left it.

A launch that reads nothing of the one before, but of those before that one, runs beside it: its programs begin by
`let_next_begin`, and one of them ends by `end_after_last`, so that the launch ends last.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Tell whether launches on a device may overlap."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_options(device: torch.device) -> dict[str, Any]:
    """Return the arguments by name of a launch of a kernel that begins by `wait_for_last(OVERLAP)`."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


@triton.jit
def wait_for_last(OVERLAP: tl.constexpr):
    """Wait until the launch before has ended, and let the programs of the next one take the places that are free."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """Let the programs of the next launch take the places that are free."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def end_after_last(OVERLAP: tl.constexpr):
    """Wait in one program until the launch before has ended."""
    if OVERLAP and tl.program_id(0) == 0:
        gdc_wait()
