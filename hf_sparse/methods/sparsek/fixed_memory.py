"""Allocate tensors whose addresses stay, for compiled steps and recorded ones keep these."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_sparse.ops.stacked import stacked, unstacked


class SharedSlots:
    """Hold the slots of several layers in one piece of memory for each kind of tensor.

    To the host, seven tensors of its own for each layer cost more than all else that a short prompt adds to a dense
    one. So they are made when the first one is read, as in decoding, and not for a cache that nobody goes on with.

    Args:
        stacks: `[layers, *shape]`, in the order of the arguments of `SlotMemory.take`.
    """

    def __init__(self, stacks: Sequence[Tensor]) -> None:
        self.stacks = stacks
        self._places = [(stack.data_ptr(), stack.stride(0) * stack.element_size()) for stack in stacks]
        self._tensors: list[tuple[Tensor, ...]] = []

    def addresses(self, number: int) -> list[int]:
        """Return where the tensors of a layer lie."""
        return [begin + number * step for begin, step in self._places]

    def tensors(self, number: int) -> tuple[Tensor, ...]:
        """Return the tensors of a layer, marked as `fix_address` does."""
        if not self._tensors:
            with lasting():
                self._tensors = list(zip(*[unstacked(stack) for stack in self.stacks], strict=True))
            for tensor in chain(*self._tensors):
                torch._dynamo.mark_static_address(tensor)  # also while what reads them is traced
        return self._tensors[number]


def alike(tensors: list[Tensor]) -> list[Tensor]:
    """Allocate tensors of the same shapes, marked as `fix_address` does; those of one shape lie in one allocation."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault((tensor.shape, tensor.dtype), []).append(place)
    made = list(tensors)
    with lasting():
        for (shape, dtype), alike in places.items():
            for place, tensor in zip(alike, stacked(len(alike), shape, dtype, tensors[0].device), strict=True):
                made[place] = tensor
                fix_address(tensor)
    return made


def lasting() -> AbstractContextManager[Any]:
    """Make tensors that can be written to in any mode: those of `torch.inference_mode` could not be after it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def fix_address(tensor: Tensor) -> None:
    """Tell CUDA graphs that the tensor stays where it is, so that they can write to it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
