"""Launch kernels, and compile all that a call will launch before it launches the first.

Otherwise a first call compiles its kernels one after the other, and the backward's only when the backward runs. The
passes of the compiler, the assembler and the C compiler of the launchers let other threads run, so that kernels which
are known together are ready almost as soon as the slowest of them. What only a later call launches can be compiled in
the background (`begin_compiling`) while the device and the host do something else.
"""

import warnings
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
import triton
from torch import Tensor

from hf_sparse.ops.triton import cores
from hf_sparse.ops.triton.replay import note_launch

_seen: set[Hashable] = set()  # families that have been compiled in this process
# By the id of a kernel (Triton hashes all of its source), what compiles it in the background.
_begun: dict[int, list[Future[None]]] = {}


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return `kernel[grid]`; called with meta tensors it computes nothing, but compiles the kernel."""

    def call(*arguments: Any, **constants: Any) -> None:
        if arguments[0].is_meta:
            kernel.warmup(*arguments, grid=grid, **constants)
        else:
            wait_for(kernel)
            note_launch(kernel, kernel[grid](*arguments, **constants), grid, arguments, constants)

    return call


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
    with _pool(query.device) as pool:
        # A thread of its own has none of the caller's modes and hooks, such as those of gradient checkpointing.
        error = _submit(pool, _compile, _Loader(pool), attention, arguments, trained).exception()
    if error is not None:
        _warn(error)


def begin_compiling(kernel: Any, calls: Callable[[], object], device: torch.device) -> None:
    """Compile in the background, side by side, what `calls()` launches; return at once.

    No result depends on it. The next launch of the kernel waits until all that was begun of it is there, rather than
    compile it again.

    Args:
        kernel: the one that is launched.
        calls: launches it with meta tensors, on another thread.
        device: on which the kernel will run; nothing begins for one that is no GPU.
    """
    # As in `compile_ahead`, binaries are loaded from other threads.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    pool = _pool(device)
    job = _submit(pool, _compile_launches, _Loader(pool), calls)
    job.add_done_callback(lambda _: pool.shutdown(wait=False))  # all is submitted, and no thread waits for more
    _begun.setdefault(id(kernel), []).append(job)


def wait_for(kernel: Any) -> None:
    """Wait until all that `begin_compiling` has begun of a kernel is compiled; what failed is a warning."""
    jobs = _begun.get(id(kernel))
    if not jobs:
        return
    done, _ = wait(tuple(jobs))
    for job in done:
        with suppress(ValueError):  # another thread has told of it
            jobs.remove(job)
            if error := job.exception():
                _warn(error)


def _pool(device: torch.device) -> ThreadPoolExecutor:
    """Return threads that compile for a device: as many as there are cores, and one to tell them what."""
    return ThreadPoolExecutor(cores() + 1, initializer=torch.cuda.set_device, initargs=(device,))


def _submit(pool: ThreadPoolExecutor, call: Callable[..., None], *arguments: Any) -> Future[None]:
    """Run a call in threads; it has failed if none can start: there are too many, or the process ends."""
    try:
        return pool.submit(call, *arguments)
    except RuntimeError as error:
        job: Future[None] = Future()
        job.set_exception(error)
        return job


def _warn(error: BaseException) -> None:
    """Warn that the kernels of a call are compiled when they are launched."""
    warnings.warn(f"kernels are compiled one after the other, ahead of the call it failed: {error!r}", stacklevel=3)


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

    def calls() -> None:
        output = attention(*meta)
        if output.requires_grad:
            inputs = [x for x in meta if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(output, inputs, torch.empty_like(output), allow_unused=True)

    _compile_launches(loader, calls)


def _compile_launches(loader: _Loader, calls: Callable[[], object]) -> None:
    with triton.AsyncCompileMode(loader, ignore_errors=True):
        calls()
