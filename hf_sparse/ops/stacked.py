"""Allocate tensors of several layers in one piece of memory."""

import math

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, that of torch's own allocations


def stacked(layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Allocate a contiguous tensor for each layer, all in one piece of memory, where torch would begin them.

    They are no views to autograd: writing to the slots of one layer would change those of another that it has saved.
    """
    used = math.prod(shape)
    room = -(-used * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize
    memory = torch.empty((layers, room), dtype=dtype, device=device)[:, :used].view(layers, *shape)
    return tuple([tensor.data for tensor in memory.unbind()])
