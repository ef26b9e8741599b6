"""Launch one binary of a kernel again and again, with other addresses, numbers and grids.

Triton looks at every argument of a launch to find the binary. A decoding step that knows it already launches it with
plain numbers, which takes a fraction of the time in Python.
"""

from typing import Any

import torch
from torch import Tensor

from hf_sparse.ops.triton.replay import direct_launch


class RepeatedLaunch:
    """Hold a kernel, and the binary that its first launch found.

    The caller answers for it that all launches have the same binary: tensors of equal dtype and alignment at the same
    places, `None` at the same places, and numbers that the kernel is not specialized for (`do_not_specialize`).

    Args:
        kernel: a function of `triton.jit`.
        constants: its last arguments, the same in all launches.
        warps: of a program.
    """

    def __init__(self, kernel: Any, constants: tuple[Any, ...], warps: int = 4) -> None:
        self.kernel, self.constants, self.warps = kernel, constants, warps
        self._launch: Any = None
        self._setting: tuple[Any, ...] = ()
        self._tensors: tuple[int, ...] = ()
        self._device = 0

    def __call__(self, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        """Launch the kernel on the current stream; the list of its other arguments is used up."""
        if self._launch is None:
            compiled = self.kernel[grid](*arguments, *self.constants, num_warps=self.warps)
            if compiled is not None:  # not so in Triton's interpreter
                self._tensors = tuple(place for place, value in enumerate(arguments) if isinstance(value, Tensor))
                self._device = arguments[self._tensors[0]].device.index
                self._launch, self._setting = direct_launch(compiled)
            return
        for place in self._tensors:
            arguments[place] = arguments[place].data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._launch(*grid, stream, *self._setting, *arguments, *self.constants)
