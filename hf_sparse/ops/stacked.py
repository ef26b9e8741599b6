"""Allocate tensors of several layers in one piece of memory."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, that of torch's own allocations


Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor


class Places(NamedTuple):
    """Say where tensors lie in one piece of memory, each where torch would begin it.

    Attributes:
        kinds: shape and dtype of each tensor.
        offsets: where each begins, in bytes.
        size: bytes of all.
    """

    kinds: tuple[Kind, ...]
    offsets: tuple[int, ...]
    size: int

    def tensor(self, memory: Tensor, number: int) -> Tensor:
        """Make one of the tensors, no view to autograd: see `unstacked`.

        Args:
            memory: `[size]` uint8.
            number: of the tensor.
        """
        (shape, dtype), offset = self.kinds[number], self.offsets[number]
        return memory.view(dtype).as_strided(shape, _strides(shape), offset // dtype.itemsize).data


def places_of(kinds: Sequence[Kind]) -> Places:
    """Return where contiguous tensors lie that follow each other in memory."""
    offsets, size = [], 0
    for shape, dtype in kinds:
        offsets.append(size)
        size += _room(shape, dtype)
    return Places(tuple(kinds), tuple(offsets), size)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes from a contiguous tensor to the next one."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def stacked(layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Allocate a contiguous tensor for each layer, all in one piece of memory, where torch would begin them."""
    return unstacked(new_stack(layers, shape, dtype, device))


def new_stack(layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate memory `[layers, *shape]`, in which that of each layer begins where torch would begin it."""
    strides = _room(shape, dtype) // dtype.itemsize, *_strides(shape)
    return torch.empty_strided((layers, *shape), strides, dtype=dtype, device=device)


def unstacked(stack: Tensor) -> tuple[Tensor, ...]:
    """Make a tensor `[*shape]` for each layer of memory `[layers, *shape]`.

    They are no views to autograd: writing to the slots of one layer would change those of another that it has saved.
    """
    return tuple([tensor.data for tensor in stack.unbind()])


def stack_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors `[*shape]` that follow each other in memory, as those of `stacked`, as one, `[n, *shape]`.

    Returns:
        `None` if they differ in shape or dtype, or lie elsewhere.
    """
    first = tensors[0]
    size, memory = first.element_size(), first.untyped_storage().data_ptr()
    apart = (tensors[-1].data_ptr() - first.data_ptr()) // max(1, len(tensors) - 1)
    for number, tensor in enumerate(tensors):
        is_next = tensor.data_ptr() == first.data_ptr() + number * apart and apart % size == 0 <= apart
        is_alike = (tensor.shape, tensor.stride(), tensor.dtype) == (first.shape, first.stride(), first.dtype)
        if not is_next or not is_alike or tensor.untyped_storage().data_ptr() != memory:
            return None
    return first.as_strided((len(tensors), *first.shape), (apart // size, *first.stride()))
