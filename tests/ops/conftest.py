"""Instruments for tensor code, and where the tests of Triton kernels run."""

import dataclasses
import os
import runpy
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FAST = runpy.run_path(str(Path(__file__).with_name("fast_interpreter.py")))


class _Kernels(pytest.Module):
    """A module of tests that needs a GPU, or Triton's interpreter: to be chosen before Triton is imported."""

    def collect(self):
        pytest.importorskip("triton", reason=f"{self.path.name} needs Triton, which is not installed")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip(f"{self.path.name} needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
        return super().collect()


def pytest_pycollect_makemodule(module_path, parent):
    return _Kernels.from_parent(parent, path=module_path) if module_path.name.startswith("test_triton_") else None


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.fixture
def largest_tensor():
    """Context manager; `.numel` is the number of elements of the largest tensor made inside, backwards included."""
    return _LargestTensor


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills what torch leaves uninitialised, with NaN or with an index that exists nowhere: an unwritten cell shows."""

    def poison(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor
            with torch.no_grad():
                return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

        return wrapped

    names = ("empty", "empty_like", "empty_strided")
    for owner, name in (*((torch, name) for name in names), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def nothing_noted(monkeypatch):
    """Forgets which launches earlier calls noted, so that the next call of any layout runs in full."""
    from hf_sparse.ops.triton import replay

    monkeypatch.setattr(replay, "_programs", {})


@pytest.fixture
def interpreter(monkeypatch):
    """Triton's interpreter, where there is no GPU: mended, and several times as fast."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang

    def with_index(tensor, scope):
        patch_tensor(tensor, scope)
        # Triton 3.6 turns arrays of one element into integers as NumPy no longer does.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def once(function):  # not again in every function that a kernel calls
        used = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        patched = used and not any(tl.core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if patched else patch_language(function)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)
    monkeypatch.setattr(interpreter, "_patch_lang", once)
    for make_faster in ("remember_types", "call_builtins_directly"):
        _FAST[make_faster](monkeypatch)
    for name, number in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):  # Triton 3.6 prefers NaN here
        mended = partialmethod(interpreter.InterpreterBuilder.binary_op, op=number)
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, mended)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
