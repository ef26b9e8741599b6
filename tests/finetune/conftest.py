import weakref
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

import hf_sparse
from hf_sparse.finetune import checkpoint


@pytest.fixture
def sparse_llama(tiny_llama):
    """Makes a tiny Llama with SparseK; the same weights each time."""

    def make(**changes):
        torch.manual_seed(1)
        return get_peft_model(tiny_llama(), hf_sparse.SparseKConfig(**{"k": 6, "window": 8, "sinks": 2, **changes}))

    return make


@pytest.fixture
def chunks():
    return torch.randint(0, 64, (12, 96), generator=torch.Generator().manual_seed(2))


class _Stopped(Exception):
    pass


@pytest.fixture
def stopped(monkeypatch):
    """`with stopped(step):` a run with checkpoints, which ends when that of the step is written."""

    @contextmanager
    def stop(at):
        real = checkpoint.save

        def save_and_stop(output, step, *args):
            real(output, step, *args)
            if step == at:
                raise _Stopped

        with monkeypatch.context() as patched, pytest.raises(_Stopped):
            patched.setattr(checkpoint, "save", save_and_stop)
            yield

    return stop


class _Held:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def held():
    """`with held(model) as count:` a forward; `count()` then tells how many numbers wait for its backward."""

    @contextmanager
    def watch(model):
        frozen, alive = {p.data_ptr() for p in model.parameters()}, weakref.WeakSet()

        def pack(tensor):
            box = _Held(tensor)
            if tensor.data_ptr() not in frozen:
                alive.add(box)
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            yield lambda: sum(box.tensor.numel() for box in alive)

    return watch
