"""Describe the state that a method keeps of one request, where its size does not depend on the length of the text."""

from math import prod
from typing import NamedTuple

import torch


class StateTensor(NamedTuple):
    """Describe one tensor of the state of a request; a pool holds it as `[rows, *shape]`.

    Attributes:
        name: what messages call it.
        shape: of the tensor of one request.
        dtype: of its numbers.
        fresh: what all its numbers are before the first token.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fresh: int = 0

    @property
    def nbytes(self) -> int:
        """Count the bytes of one request."""
        return prod(self.shape) * self.dtype.itemsize
