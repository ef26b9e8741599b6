"""Launching kernels, and compiling all that a call will launch before it launches the first.

Otherwise a first call meets its kernels one after the other, and those of its backward only when it gets there. Passes
of the compiler, the assembler and the C compiler of the launchers let other threads run, so kernels that are known
together are ready almost as soon as the slowest of them.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

_seen: set[tuple[object, ...]] = set()  # what has been compiled in this process


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """`kernel[grid]`, for calls that may be made with meta tensors: these compute nothing, but compile the kernel."""

    def call(*arguments: Any, **constants: Any) -> None:
        if arguments[0].is_meta:
            kernel.warmup(*arguments, grid=grid, **constants)
        else:
            kernel[grid](*arguments, **constants)

    return call


class _Loaders(ThreadPoolExecutor):
    """Threads that compile a kernel and load it."""

    def submit(self, compiled: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        def load() -> Any:
            kernel = compiled()
            _ = kernel.run  # builds the launcher and loads the binary
            return kernel

        return super().submit(load)


def compile_ahead(attention: Callable[..., Tensor], *arguments: Any) -> None:
    """Compile, side by side, what `attention(*arguments)` and its backward launch; once for each family of shapes.

    This saves time and nothing depends on it: what fails or is missing here, the call compiles (or fails at) itself.
    The current device is that of the arguments.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors]
    query, key, *_ = tensors
    sizes = (query.shape[1] // key.shape[1], query.shape[3])
    flags = [argument for argument in arguments if isinstance(argument, bool)]
    family = (attention, query.device, query.dtype, *sizes, *flags, *wanted)
    mode = getattr(triton, "AsyncCompileMode", None)  # of Triton 3.4 and later
    if family in _seen or mode is None or not query.is_cuda or torch.compiler.is_compiling():
        return
    _seen.add(family)
    meta = {
        id(tensor): torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta", requires_grad=want
        )
        for tensor, want in zip(tensors, wanted, strict=True)
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = _Loaders(cores, initializer=torch.cuda.set_device, initargs=(query.device,))
    with pool, mode(pool, ignore_errors=True):
        output = attention(*(meta.get(id(argument), argument) for argument in arguments))
        if output.requires_grad:
            inputs = [tensor for tensor in meta.values() if tensor.requires_grad]
            torch.autograd.grad(output, inputs, torch.empty_like(output), allow_unused=True)
