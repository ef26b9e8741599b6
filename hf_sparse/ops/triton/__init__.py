"""Decide whether Triton kernels can run, and compile and launch them."""

import importlib.util
import os

import torch
from torch import Tensor

#: Dtypes of the tensors that the kernels take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Softmax is computed by powers of two: GPUs have an instruction for these.
LOG2_E = 1.4426950408889634
#: Programs along all but the first dimension of a grid, where CUDA ends: there is one for each batch row and KV head.
MOST_ROWS = 65_535

_INSTALLED = importlib.util.find_spec("triton") is not None  # a compiled function could not look for it


def available(device: torch.device) -> bool:
    """Tell whether kernels run on tensors of this device: CUDA with Triton, or any device with Triton's interpreter."""
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and installed()


def installed() -> bool:
    """Tell whether Triton is installed, on whatever device."""
    return _INSTALLED


def is_on_gpu(tensor: Tensor) -> bool:
    """Tell whether a tensor is on the current device of CUDA, which is where Triton launches.

    Within `torch.func.vmap` and the like a tensor stands for others, and has no address.
    """
    if not tensor.is_cuda or tensor.device.index != torch.cuda.current_device():
        return False
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


def cores() -> int:
    """Count the cores on which this process may compile kernels."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
