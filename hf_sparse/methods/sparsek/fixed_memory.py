"""Allocate tensors whose addresses stay, for compiled steps and recorded ones keep these."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_sparse.ops.stacked import Places, stacked

TENSORS = 7  # of the slots of a layer


class SharedSlots:
    """Hold the slots of several layers in one piece of memory.

    To the host, seven tensors of its own for each layer cost more than all else that a short prompt adds to a dense
    one. So they are made when one of them is read, as in decoding, and not for a cache that nobody goes on with.

    Args:
        places: of the tensors of all layers; those of a layer are in the order of the arguments of `SlotMemory.take`.
        device: that has them.

    Attributes:
        dtype, device: of keys and values.
    """

    def __init__(self, places: Places, device: torch.device) -> None:
        self.dtype, self.device = places.kinds[0][1], device
        with lasting():
            self._memory = torch.empty(places.size, dtype=torch.uint8, device=device)
        begin = self._memory.data_ptr()
        self._places, self._addresses = places, [begin + offset for offset in places.offsets]

    def addresses(self, number: int) -> list[int]:
        """Return where the tensors of a layer lie."""
        return self._addresses[TENSORS * number : TENSORS * (number + 1)]

    def tensors(self, number: int) -> tuple[Tensor, ...]:
        """Make the tensors of a layer, marked as `fix_address` does."""
        with lasting():
            tensors = [self._places.tensor(self._memory, TENSORS * number + place) for place in range(TENSORS)]
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)  # also while what reads them is traced
        return tuple(tensors)


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
