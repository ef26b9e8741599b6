"""Launch kernels, and compile all that a call will launch before it launches the first.

Otherwise a first call compiles its kernels one after the other, and the backward's only when the backward runs. The
passes of the compiler, the assembler and the C compiler of the launchers let other threads run, so that kernels which
are known together are ready almost as soon as the slowest of them.

Kernels of one call can overlap: `early` lets the programs of a kernel come while the last ones of the kernel before
still run. No program of a kernel comes before all of the kernel before have called `take_over` or ended, and these have
waited for all earlier work. So a kernel may read, before it calls `take_over` itself, what was there when the kernel
before it was launched, which for all but the first of a call are the arguments of the call; everything else comes
after. A kernel that is launched without `early`, be it ours or anybody's, begins when all before it has ended, and in a
recorded graph the same order holds.
"""

import functools
import os
import warnings
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.triton.replay import note_launch

_seen: set[Hashable] = set()  # families that have been compiled in this process


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return `kernel[grid]`; called with meta tensors it computes nothing, but compiles the kernel."""

    def call(*arguments: Any, **constants: Any) -> None:
        if arguments[0].is_meta:
            kernel.warmup(*arguments, grid=grid, **constants)
        else:
            note_launch(kernel, kernel[grid](*arguments, **constants), grid, arguments, constants)

    return call


def early() -> dict[str, bool]:
    """Return what to launch a kernel with that calls `take_over(EARLY)` or `stay(EARLY)`.

    Its programs may then be there before the kernel that was launched before has ended: NVIDIA's programmatic dependent
    launch, from Hopper on.
    """
    return {"EARLY": True, "launch_pdl": True} if _launches_early() else {"EARLY": False}


def _launches_early() -> bool:
    if torch.version.hip is not None or triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return _is_hopper(torch.cuda.current_device())


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def take_over(EARLY: tl.constexpr):
    """Wait for the end of the kernel that was launched before, and let the programs of the next one come.

    So what a kernel reads before it calls this function must be there before the kernel that was launched before."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def stay(EARLY: tl.constexpr):
    """Wait, in one program at its end, for the kernel that was launched before and whose results nobody has read.

    What comes after this kernel then comes after both. The kernel before must call `take_over`: so those before it have
    ended, and what they wrote can be read without waiting."""
    if EARLY and tl.program_id(0) == 0:
        tl.extra.cuda.gdc_wait()


def compile_ahead(attention: Callable[..., Tensor], *arguments: Any, family: Hashable = None) -> None:
    """Compile, side by side, what `attention(*arguments)` and its backward launch; once for each family of shapes.

    No result depends on it: a call compiles each kernel that is still missing, and raises the compiler's error if there
    is one. The current device must be the device of the arguments.

    Args:
        attention: called with meta tensors in place of the arguments that are tensors.
        *arguments: the first two are query and key.
        family: a key that differs between calls that launch different kernels; by default `attention` itself.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    query, key = tensors[:2]
    # Anomaly detection would look for NaN in the gradients, and meta tensors hold nothing.
    if not query.is_cuda or torch.compiler.is_compiling() or torch.is_anomaly_enabled():
        return
    trained = [tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors]
    kernels = attention if family is None else family
    group, dim = query.shape[1] // key.shape[1], query.shape[3]
    family = (kernels, query.device, query.dtype, group, dim, *trained)
    # Binaries are loaded from other threads, which could break off the capture of a CUDA graph.
    if family in _seen or torch.cuda.is_current_stream_capturing():
        return
    _seen.add(family)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores + 1, initializer=torch.cuda.set_device, initargs=(query.device,)) as pool:
        # A thread of its own has none of the caller's modes and hooks, such as those of gradient checkpointing.
        error = pool.submit(_compile, _Loader(pool), attention, arguments, trained).exception()
    if error is not None:
        warnings.warn(f"kernels are compiled one after the other, ahead of the call it failed: {error!r}", stacklevel=2)


class _Loader:
    """Load each kernel after it was compiled: the executor that Triton asks for."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool

    def submit(self, compiled: Callable[[], Any]) -> Future[Any]:
        def load() -> Any:
            kernel = compiled()
            _ = kernel.run  # builds the launcher and loads the binary
            return kernel

        return self.pool.submit(load)


def _compile(
    loader: _Loader, attention: Callable[..., Tensor], arguments: tuple[Any, ...], trained: list[bool]
) -> None:
    wants = iter(trained)
    meta = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=next(wants))
        if isinstance(x, Tensor)
        else x
        for x in arguments
    ]
    with triton.AsyncCompileMode(loader, ignore_errors=True):
        output = attention(*meta)
        if output.requires_grad:
            inputs = [x for x in meta if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(output, inputs, torch.empty_like(output), allow_unused=True)
